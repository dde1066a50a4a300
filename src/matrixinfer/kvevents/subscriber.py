"""Follows the KV events of many engines over ZMQ.

Each engine has a SUB socket, drained on the event loop, and a task that fetches replays when the feed asks for them.
ZMQ reconnects by itself with back-off; a monitor tells when it has, because what was published in between is lost and
the engine may be another one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

import structlog
import zmq
from zmq.utils.monitor import parse_monitor_message

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.index.base import BlockIndex
from matrixinfer.kvevents.drain import SLICE_SECONDS, Drain
from matrixinfer.kvevents.feed import FeedState, PodFeed
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.replay import Reply, fetch

LIVE_FRAMES_QUEUED = 100_000
REPLAY_ATTEMPTS = 3
"""Rounds in a row without progress after which a replay is given up."""
RETRY_SECONDS = 30.0
"""Time after which a replay that was given up is tried again."""
RESTART_MIN_SECONDS, RESTART_MAX_SECONDS = 1.0, 30.0
RECONNECT_MIN_MS, RECONNECT_MAX_MS = 100, 5_000
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 5_000, 15_000

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedSource:
    """Where one engine publishes, and what its blocks are called in the index."""

    pod: str
    model: str
    endpoint: str
    replay_endpoint: str | None = None
    topic: str | None = None


class Subscriber:
    """Keeps an index up to date with the engines it follows.

    Use as an async context manager; `follow` and `unfollow` at any time within it.
    """

    def __init__(self, *, index: BlockIndex, blocks: TokenBlockProcessor) -> None:
        self._index = index
        self._blocks = blocks
        self.feeds: dict[str, PodFeed] = {}
        """The feed of each followed pod; for reading."""
        self._followed: dict[str, tuple[_Subscription, asyncio.Task[None]]] = {}
        self._drain = Drain()
        self._applying = asyncio.Lock()
        self._group = asyncio.TaskGroup()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None

    async def __aenter__(self) -> Subscriber:
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 16_384)  # three per engine
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pod in list(self._followed):
            self.unfollow(pod)
        # The group must not see the caller's error: it would wrap it in an exception group.
        await self._group.__aexit__(None, None, None)
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context = None

    def follow(self, source: FeedSource) -> PodFeed:
        """Follow an engine, which need not be there yet. A pod that is followed from another source is followed anew."""
        if self._context is None:
            raise RuntimeError("the subscriber is not running")
        if source.pod in self._followed:
            if self._followed[source.pod][0].source == source:
                return self.feeds[source.pod]
            self.unfollow(source.pod)
        ledger = Ledger(pod=source.pod, model=source.model, blocks=self._blocks, index=self._index)
        feed = PodFeed(ledger, can_replay=source.replay_endpoint is not None)
        subscription = _Subscription(self._context, self._drain, self._applying, source, feed)
        task = self._group.create_task(subscription.run(), name=f"kv-events {source.pod}")
        self._followed[source.pod] = subscription, task
        self.feeds[source.pod] = feed
        return feed

    def unfollow(self, pod: str) -> None:
        """Stop to follow an engine and forget what it held. Nothing happens when it is not followed."""
        if pod not in self._followed:
            return
        subscription, task = self._followed.pop(pod)
        del self.feeds[pod]
        subscription.closed = True
        task.cancel()
        self._index.forget(pod)


class _Subscription:
    """The sockets of one engine."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        drain: Drain,
        applying: asyncio.Lock,
        source: FeedSource,
        feed: PodFeed,
    ) -> None:
        self.source = source
        self.feed = feed
        self.closed = False
        """From here on the feed is left alone; the task may take a moment to end."""
        self._context = context
        self._drain = drain
        self._applying = applying  # one replay at a time, so that their slices do not add up
        self._topic = None if source.topic is None else source.topic.encode()
        self._connections = 0
        self._replay_wanted = asyncio.Event()
        self._log = log.bind(pod=source.pod)
        self._logged_state: FeedState | None = None

    async def run(self) -> None:
        """Follow until cancelled."""
        pause = RESTART_MIN_SECONDS
        while True:
            try:
                await self._follow()
            except Exception:
                # Supervision boundary: a fault in one feed, such as a bad endpoint, must not end the others.
                log.exception("kv_events_failed", pod=self.source.pod, endpoint=self.source.endpoint)
            self._connections = 0
            self.feed.start_over()
            self._note_state()
            await asyncio.sleep(pause)
            pause = min(pause * 2, RESTART_MAX_SECONDS)

    async def _follow(self) -> None:
        """Follow until cancelled or something breaks."""
        with ExitStack() as stack:
            live = self._context.socket(zmq.SUB)
            stack.callback(live.close, linger=0)
            live.setsockopt(zmq.RCVHWM, LIVE_FRAMES_QUEUED)
            live.setsockopt(zmq.IPV6, 1)
            live.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MIN_MS)
            live.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
            # A subscriber sends nothing, so without heartbeats it would wait on a dead connection for ever.
            live.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
            live.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
            live.setsockopt(zmq.SUBSCRIBE, b"")
            monitor = live.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
            stack.callback(monitor.close, linger=0)
            stack.callback(live.disable_monitor)
            live.connect(self.source.endpoint)
            stack.enter_context(self._drain.reading(monitor, self._on_connection))
            stack.enter_context(self._drain.reading(live, self._on_frame))
            while True:
                await self._until_replay_wanted()
                await self._replay()
                self._note_state()

    def _on_frame(self, parts: list[bytes]) -> None:
        stats = self.feed.stats
        if self.closed:
            return
        if len(parts) != 3 or len(parts[1]) != 8:
            stats.malformed += 1
            return
        if self._topic is not None and parts[0] != self._topic:
            stats.wrong_topic += 1
            if stats.wrong_topic == 1:
                got = parts[0][:64].decode("utf-8", "replace")
                self._log.warning("kv_events_wrong_topic", expected=self.source.topic, got=got)
            return
        self._safely(self.feed.live, int.from_bytes(parts[1], "big"), parts[2])
        self._note_state()

    def _on_connection(self, parts: list[bytes]) -> None:
        if self.closed:
            return
        if parse_monitor_message(parts)["event"] == zmq.EVENT_DISCONNECTED:
            self._log.warning("kv_events_disconnected", endpoint=self.source.endpoint)
            if self._connections:  # else a handshake failed
                self.feed.disconnected()
        else:
            self._log.info("kv_events_connected", endpoint=self.source.endpoint)
            self._connections += 1
            if self._connections > 1:
                self.feed.start_over()
        self._note_state()

    def _note_state(self) -> None:
        if self.feed.replay_from is not None and self._connections:
            self._replay_wanted.set()
        if self.feed.state is not self._logged_state:
            self._logged_state = self.feed.state
            self._log.info("kv_events_state", state=self.feed.state.value)

    async def _until_replay_wanted(self) -> None:
        while True:
            try:
                async with asyncio.timeout(RETRY_SECONDS if self.feed.given_up else None):
                    await self._replay_wanted.wait()
            except TimeoutError:
                await self._try_again()
            else:
                self._replay_wanted.clear()
                return

    async def _try_again(self) -> None:
        """Start a feed over whose replay was given up, but only once the engine answers."""
        reply = await self._fetch(0)
        if reply.frames and self.feed.given_up:
            self.feed.start_over()
            await self._hand_over(reply)
            self._note_state()

    async def _replay(self) -> None:
        """Fetch what the feed asks for in rounds, with back-off; give up for now after some without progress."""
        idle = 0
        while (start := self.feed.replay_from) is not None:
            epoch = self.feed.epoch
            reply = await self._fetch(start)
            if (self.feed.replay_from, self.feed.epoch) == (start, epoch):
                await self._hand_over(reply)
            idle = 0 if self.feed.epoch == epoch and self.feed.replay_from != start else idle + 1
            if idle == REPLAY_ATTEMPTS:
                self._log.warning("kv_events_replay_failed", endpoint=self.source.replay_endpoint)
                self._safely(self.feed.replay_failed)
            elif idle:
                await asyncio.sleep(0.2 * 2**idle)

    async def _hand_over(self, reply: Reply) -> None:
        """Hand a replay to the feed in slices, until the feed wants another one."""
        asked = (self.feed.replay_from, self.feed.epoch)
        async with self._applying:
            deadline = time.monotonic() + SLICE_SECONDS
            for seq, payload in reply.frames:
                if (self.feed.replay_from, self.feed.epoch) != asked:
                    return
                self._safely(self.feed.replayed, seq, payload)
                if time.monotonic() > deadline:
                    await asyncio.sleep(0)
                    deadline = time.monotonic() + SLICE_SECONDS
            if (self.feed.replay_from, self.feed.epoch) != asked:
                return
            self._safely(self.feed.replay_ended if reply.whole else self.feed.replay_broke_off)

    async def _fetch(self, start: int) -> Reply:
        """What the engine has from number `start` on; an empty reply when it cannot be asked."""
        if self.source.replay_endpoint is None:
            return Reply()
        try:
            reply = await fetch(self._context, self._drain, self.source.replay_endpoint, start)
        except zmq.ZMQError as error:
            self._log.warning("kv_events_replay_refused", endpoint=self.source.replay_endpoint, error=str(error))
            return Reply()
        self.feed.stats.malformed += reply.malformed
        if not reply.whole:
            self._log.info("kv_events_replay_interrupted", frames=len(reply.frames), malformed=reply.malformed)
        return reply

    def _safely(self, step: Callable[..., None], *args: object) -> None:
        """Let the feed take a step."""
        try:
            step(*args)
        except Exception:
            # Supervision boundary: a fault over one frame must not stop the feed.
            log.exception("kv_events_frame_failed", pod=self.source.pod)
            self.feed.spoiled()
