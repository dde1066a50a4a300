"""Follows the KV events of many engines over ZMQ.

Each engine has a SUB socket, drained on the event loop in slices of at most `SLICE_SECONDS`, and a task that fetches
replays when the feed asks for them. ZMQ reconnects by itself with back-off; a monitor tells when it has, because what
was published in between is lost and the engine may be another one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import structlog
import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.index.base import BlockIndex
from matrixinfer.kvevents.feed import FeedState, PodFeed
from matrixinfer.kvevents.ledger import Ledger

SLICE_SECONDS = 0.002
LIVE_FRAMES_QUEUED = 100_000
REPLAY_MAX_BYTES = 512 * 1024 * 1024
REPLAY_FRAME_TIMEOUT = 5.0
REPLAY_ATTEMPTS = 3
RECONNECT_MIN_MS, RECONNECT_MAX_MS = 100, 5_000
_END = b"\xff" * 8

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
        self._subscriptions: dict[str, _Subscription] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None

    async def __aenter__(self) -> Subscriber:
        self._context = zmq.Context()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pod in list(self._subscriptions):
            await self.unfollow(pod)
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context = None

    def wrong_topics(self, pod: str) -> int:
        """Frames of `pod` that came under another topic than the configured one."""
        return self._subscriptions[pod].wrong_topic

    def follow(self, source: FeedSource) -> PodFeed:
        """Start to follow an engine; it need not be there yet. Raises `ValueError` when its pod is followed already."""
        if self._context is None:
            raise RuntimeError("the subscriber is not running")
        if source.pod in self._subscriptions:
            raise ValueError(f"{source.pod} is followed already")
        ledger = Ledger(pod=source.pod, model=source.model, blocks=self._blocks, index=self._index)
        feed = PodFeed(ledger, can_replay=source.replay_endpoint is not None)
        subscription = _Subscription(self._context, source, feed)
        self._subscriptions[source.pod] = subscription
        self.feeds[source.pod] = feed
        self._tasks[source.pod] = asyncio.create_task(subscription.run(), name=f"kv-events {source.pod}")
        return feed

    async def unfollow(self, pod: str) -> None:
        """Stop to follow an engine and forget what it held."""
        self._subscriptions.pop(pod)
        del self.feeds[pod]
        task = self._tasks.pop(pod)
        task.cancel()
        await asyncio.wait([task])
        self._index.forget(pod)


class _Subscription:
    """The sockets of one engine."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], source: FeedSource, feed: PodFeed) -> None:
        self.feed = feed
        self.wrong_topic = 0
        self._context = context
        self._source = source
        self._topic = None if source.topic is None else source.topic.encode()
        self._connections = 0
        self._replay_wanted = asyncio.Event()
        self._log = log.bind(pod=source.pod)
        self._logged_state: FeedState | None = None

    async def run(self) -> None:
        """Follow until cancelled."""
        loop = asyncio.get_running_loop()
        live = self._context.socket(zmq.SUB)
        live.setsockopt(zmq.RCVHWM, LIVE_FRAMES_QUEUED)
        live.setsockopt(zmq.IPV6, 1)
        live.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MIN_MS)
        live.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        live.setsockopt(zmq.SUBSCRIBE, b"")
        monitor = live.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        readers = [_Reader(loop, live, self._on_frame, self._after_slice), _Reader(loop, monitor, self._on_connection)]
        try:
            live.connect(self._source.endpoint)
            for reader in readers:
                reader.start()
            while True:
                await self._replay_wanted.wait()
                self._replay_wanted.clear()
                if self.feed.replay_from is not None:
                    await self._replay()
                    self._after_slice()
        finally:
            for reader in readers:
                reader.stop()
            live.disable_monitor()
            monitor.close(linger=0)
            live.close(linger=0)

    def _on_frame(self, parts: list[bytes]) -> None:
        if len(parts) != 3 or len(parts[1]) != 8:
            self.feed.stats.malformed += 1
            return
        if self._topic is not None and parts[0] != self._topic:
            self.wrong_topic += 1
            if self.wrong_topic == 1:
                got = parts[0][:64].decode("utf-8", "replace")
                self._log.warning("kv_events_wrong_topic", expected=self._source.topic, got=got)
            return
        self.feed.live(int.from_bytes(parts[1], "big"), parts[2])

    def _on_connection(self, parts: list[bytes]) -> None:
        event = parse_monitor_message(parts)["event"]
        if event == zmq.EVENT_DISCONNECTED:
            self._log.warning("kv_events_disconnected", endpoint=self._source.endpoint)
            return
        self._connections += 1
        if self._connections > 1:
            self.feed.reconnected()
        self._log.info("kv_events_connected", endpoint=self._source.endpoint)
        self._after_slice()

    def _after_slice(self) -> None:
        if self.feed.replay_from is not None and self._connections:
            self._replay_wanted.set()
        if self.feed.state is not self._logged_state:
            self._logged_state = self.feed.state
            self._log.info("kv_events_state", state=self.feed.state.value)

    async def _replay(self) -> None:
        """Fetch what the feed asks for, with back-off between attempts; give up for now after a few."""
        for attempt in range(REPLAY_ATTEMPTS):
            if attempt:
                await asyncio.sleep(0.2 * 2**attempt)
            start, epoch = self.feed.replay_from, self.feed.epoch
            if start is None:
                return
            frames = await self._fetch(start)
            if frames is not None and await self._apply(frames, start, epoch):
                return
        self._log.warning("kv_events_replay_failed", endpoint=self._source.replay_endpoint)
        self.feed.replay_failed()

    async def _apply(self, frames: list[tuple[int, bytes]], start: int, epoch: int) -> bool:
        """Hand a replay to the feed in slices. False when the feed wants another one."""
        deadline = time.monotonic() + SLICE_SECONDS
        for seq, payload in frames:
            if (self.feed.replay_from, self.feed.epoch) != (start, epoch):
                return False
            self.feed.replayed(seq, payload)
            if time.monotonic() > deadline:
                await asyncio.sleep(0)
                deadline = time.monotonic() + SLICE_SECONDS
        if (self.feed.replay_from, self.feed.epoch) != (start, epoch):
            return False
        self.feed.replay_ended()
        return self.feed.replay_from is None

    async def _fetch(self, start: int) -> list[tuple[int, bytes]] | None:
        """All frames from number `start` on; None when the engine does not answer to the end."""
        if self._source.replay_endpoint is None:
            return None
        # The engine's socket drops frames past its own mark, so this side takes all it can as fast as it can.
        socket = zmq.asyncio.Context.shadow(self._context.underlying).socket(zmq.DEALER)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.IPV6, 1)
        frames: list[tuple[int, bytes]] = []
        size = 0
        try:
            socket.connect(self._source.replay_endpoint)
            await asyncio.wait_for(socket.send_multipart([b"", start.to_bytes(8, "big")]), REPLAY_FRAME_TIMEOUT)
            while size <= REPLAY_MAX_BYTES:
                parts = await asyncio.wait_for(socket.recv_multipart(), REPLAY_FRAME_TIMEOUT)
                if len(parts) < 2 or len(parts[-2]) != 8:
                    self.feed.stats.malformed += 1
                    continue
                if parts[-2] == _END:
                    return frames
                size += len(parts[-1])
                frames.append((int.from_bytes(parts[-2], "big"), parts[-1]))
        except (TimeoutError, zmq.ZMQError) as error:
            self._log.info("kv_events_replay_interrupted", frames=len(frames), error=type(error).__name__)
        finally:
            socket.close(linger=0)
        return None


class _Reader:
    """Drains a socket on the event loop whenever it is readable, at most one slice at a time.

    ZMQ's descriptor signals edges: a drain must go on until the socket is empty, now or in a later slice.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        socket: zmq.Socket[bytes],
        on_message: Callable[[list[bytes]], None],
        after_slice: Callable[[], None] = lambda: None,
    ) -> None:
        self._loop = loop
        self._socket = socket
        self._on_message = on_message
        self._after_slice = after_slice
        self._next: asyncio.Handle | None = None
        self._descriptor = int(socket.getsockopt(zmq.FD))

    def start(self) -> None:
        self._loop.add_reader(self._descriptor, self._drain)
        self._drain()

    def stop(self) -> None:
        self._loop.remove_reader(self._descriptor)
        if self._next is not None:
            self._next.cancel()

    def _drain(self) -> None:
        if self._next is not None:
            self._next.cancel()
            self._next = None
        deadline = time.monotonic() + SLICE_SECONDS
        while True:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._on_message(parts)
            if time.monotonic() > deadline:
                self._next = self._loop.call_soon(self._drain)
                break
        self._after_slice()
