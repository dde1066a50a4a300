"""Follows the KV events of one publisher over ZMQ.

A SUB socket is drained on the event loop, and a task fetches replays when the feed asks for them. ZMQ reconnects by
itself with back-off; a monitor reports when it has, because what was published in between is lost and the engine may be
another one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import ParamSpec

import structlog
import zmq
from zmq.utils.monitor import parse_monitor_message

from matrixinfer.config.endpoint_names import EndpointName
from matrixinfer.errors import shortage_in
from matrixinfer.kvevents.connect import Unresolved, connect, subscribe
from matrixinfer.kvevents.drain import SLICE_SECONDS, Drain
from matrixinfer.kvevents.feed import REPLAY_ATTEMPTS, FeedState, PodFeed
from matrixinfer.kvevents.ledger import SMALL_BLOCK, Ledger
from matrixinfer.kvevents.limits import UNCONFIRMED
from matrixinfer.kvevents.replay import Reply, fetch

CONNECT_SECONDS = 10.0
"""Time after which an unreachable publisher is logged."""
MAX_REPLAYS = 8
"""Replays fetched at the same time, which bounds their memory."""
RETRY_SECONDS = 30.0
"""Time until a replay that was given up is tried again."""
HEARTBEAT_SECONDS = 10.0
"""A silent engine is asked at this interval whether anything was lost."""
MAX_HEARTBEATS = 4
"""Engines asked at the same time."""
_UNCONFIRMED = "unconfirmed"
RESTART_MIN_SECONDS, RESTART_MAX_SECONDS = 1.0, 30.0

_Step = ParamSpec("_Step")

_GOOD = (FeedState.SYNCING, FeedState.COMPLETE)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedSource:
    """Where one engine, or a rank of it, publishes, and the names of its blocks in the index."""

    pod: str
    model: str
    endpoint: str
    replay_endpoint: str | None = None
    topic: str | None = None
    rank: int | None = None
    """Data-parallel rank, if each has a cache and a feed of its own."""
    batch_ranks: frozenset[int] = field(default=frozenset(), compare=False)
    """The numbers that its batches may carry as their rank; empty if that is not known."""
    root: str | None = None
    """Where the model was loaded from: another one has other blocks."""
    is_reported: bool = False
    """The engine itself said so, and may say something else after a restart."""

    @property
    def name(self) -> str:
        """The endpoint name under which the index holds this publisher's blocks: `pod`, or `pod@dp1`."""
        return str(EndpointName(self.pod, self.rank))


class _StayedAway(Exception):
    """A lost connection does not come back. ZMQ tries no more after a message that it refused: make a new one."""


class Shared:
    """What all subscriptions of one process share."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        on_shortage: Callable[[str, str], None] = lambda _place, _what: None,
    ) -> None:
        self.context = context
        self.on_shortage = on_shortage
        self.drain = Drain()
        self.applying = asyncio.Lock()
        """Only one replay is applied at a time, so that their slices do not add up."""
        self.replaying = asyncio.Semaphore(MAX_REPLAYS)
        self.asking = asyncio.Semaphore(MAX_HEARTBEATS)


class Subscription:
    """The sockets of one publisher."""

    def __init__(
        self,
        shared: Shared,
        source: FeedSource,
        feed: PodFeed,
        on_reconnected: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.source = source
        self.feed = feed
        self.connections = 0
        """How often a connection was made or lost."""
        self._on_reconnected = on_reconnected
        self.closed = False
        """The feed is left alone from now on; the task may take a moment to end."""
        self._shared = shared
        self._topic = None if source.topic is None else source.topic.encode()
        self._connected = False
        self._broken = False
        """The connection was lost, and the feed does not know about a new one yet."""
        self._slice_ends = 0.0
        self._replay_wanted = asyncio.Event()
        self._log = log.bind(pod=source.name)
        self._logged_state: FeedState | None = None
        self._logged_layout = False

    async def run(self) -> None:
        """Follow until cancelled."""
        pause = RESTART_MIN_SECONDS
        while True:
            try:
                await self._follow()
            except _StayedAway:
                continue
            except Exception as error:
                # Supervision boundary: an error in one feed, such as a bad endpoint, must not end the others.
                if self._is_shortage(error):
                    pass  # it says nothing about the publisher
                elif isinstance(error, Unresolved):
                    self._log.warning("kv_events_unresolved", endpoint=self.source.endpoint, error=error.strerror)
                else:
                    log.exception("kv_events_failed", pod=self.source.name, endpoint=self.source.endpoint)
            if self._connected:
                pause = RESTART_MIN_SECONDS
            self._lost()
            await asyncio.sleep(pause)
            pause = min(pause * 2, RESTART_MAX_SECONDS)

    def _is_shortage(self, error: Exception) -> bool:
        """Whether this process could not connect, whatever the publisher."""
        shortage = shortage_in(error)
        if shortage is not None:
            self._shared.on_shortage("events", f"cannot connect to {self.source.endpoint}: {shortage}")
        return shortage is not None

    async def _follow(self) -> None:
        """Follow until cancelled or something fails."""
        with ExitStack() as stack:
            live = subscribe(self._shared.context)
            stack.callback(live.close, linger=0)
            monitor = live.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
            stack.callback(monitor.close, linger=0)
            stack.callback(live.disable_monitor)
            await connect(live, self.source.endpoint)
            stack.enter_context(self._shared.drain.reading(monitor, self._on_connection))
            stack.enter_context(self._shared.drain.reading(live, self._on_frame))
            while True:
                await self._until_replay_wanted()
                await self.replay()
                self._note_state()

    def resync(self, *, replay: bool) -> None:
        """The index has turned out wrong: fetch the engine's history again, or clear it and go on from live frames."""
        if replay:
            self._safely(self.feed.start_over)
        else:
            self._safely(self.feed.purge)
        self._note_state()

    def _on_frame(self, parts: list[bytes]) -> Iterator[None] | None:
        """Take a message. What is left to do of it comes back, to be done before the next one is taken."""
        if self.closed:
            return None
        rest = self._after_the_rest(parts) if self.feed.is_unfinished else None
        if rest is None:
            self._take(parts)
            rest = self._rest() if self.feed.is_unfinished else None
        return rest

    def _rest(self) -> Iterator[None]:
        """Apply what is left of a long frame, unless nobody wants it any more."""
        while not self.closed and self._safely(self.feed.go_on):
            yield
        self._note_state()

    def _after_the_rest(self, parts: list[bytes]) -> Iterator[None]:
        yield from self._rest()
        yield from self._on_frame(parts) or ()

    def _take(self, parts: list[bytes]) -> None:
        stats = self.feed.stats
        if len(parts) != 3 or len(parts[1]) != 8:
            stats.malformed += 1
            return
        if self._topic is not None and parts[0] != self._topic:
            stats.wrong_topic += 1
            if stats.wrong_topic == 1:
                got = parts[0][:64].decode("utf-8", "replace")
                self._log.warning("kv_events_topic_mismatched", expected=self.source.topic, got=got)
            return
        stats.last_frame_at = time.time()
        self._safely(self.feed.live, int.from_bytes(parts[1], "big"), parts[2], whole=False)
        self._note_state()

    def _on_connection(self, parts: list[bytes]) -> None:
        if self.closed:
            return
        if parse_monitor_message(parts)["event"] == zmq.EVENT_DISCONNECTED:
            if self._connected:  # otherwise a handshake failed, as it will again and again
                self._log.warning("kv_events_disconnected", endpoint=self.source.endpoint)
                self._lost()
            return
        self._log.info("kv_events_connected", endpoint=self.source.endpoint)
        self.connections += 1
        if self._connected or self._broken:
            self._reconnected()
        self._connected, self._broken = True, False
        self._note_state()

    def _reconnected(self) -> None:
        """Another engine may have the port now: have the engine say again where it publishes."""
        self.feed.reconnected()
        if self.source.is_reported:
            self.feed.suspect(_UNCONFIRMED, UNCONFIRMED)
            self._on_reconnected(self.source.pod)

    def confirm(self, connections: int) -> None:
        """The engine still publishes here, as it said after `connections` changes of the connection."""
        if connections == self.connections:
            self.feed.suspect(_UNCONFIRMED, None)
            self._note_state()

    def _lost(self) -> None:
        self.connections += 1
        self._connected, self._broken = False, True
        self.feed.disconnected()
        self._note_state()

    def _note_state(self) -> None:
        if self.feed.replay_from is not None and self._connected:
            self._replay_wanted.set()
        if not self._logged_layout and self.feed.ledger.block_size is not None:
            self._logged_layout = True
            self._note_layout(self.feed.ledger, self.feed.ledger.block_size)
        if self.feed.state is not self._logged_state:
            self._logged_state = self.feed.state
            reason = self.feed.untrusted or next(iter(self.feed.limits), None)
            why = {} if reason is None else {"reason": reason}
            if self.feed.state in _GOOD:
                self._log.info("kv_events_state_changed", state=self.feed.state.value)
            else:
                self._log.warning("kv_events_degraded", state=self.feed.state.value, **why)

    def _note_layout(self, ledger: Ledger, block_size: int) -> None:
        hidden = {"salts": ledger.hides_salts, "adapters": ledger.hides_adapters}
        self._log.info(
            "kv_events_layout_learned",
            engine_block=block_size,
            hides=[what for what, is_hidden in hidden.items() if is_hidden],
        )
        if block_size < SMALL_BLOCK:
            self._log.warning("kv_events_small_blocks_found", engine_block=block_size, better=SMALL_BLOCK)

    async def _until_replay_wanted(self) -> None:
        while True:
            live, wait = self.feed.stats.last_frame_at, self._patience
            try:
                async with asyncio.timeout(wait):
                    await self._replay_wanted.wait()
            except TimeoutError:
                if not (self._connected or self._broken):
                    self._log.warning("kv_events_not_connected", endpoint=self.source.endpoint)
                    self._lost()
                elif self._broken:
                    raise _StayedAway from None
                elif self.feed.given_up:
                    await self._try_again()
                elif self._connected and self.feed.stats.last_frame_at == live:
                    await self._heartbeat()
            else:
                self._replay_wanted.clear()
                return

    @property
    def _patience(self) -> float:
        """Seconds to wait for a wanted replay before looking after the connection."""
        if not (self._connected or self._broken):
            return CONNECT_SECONDS
        return RETRY_SECONDS if self.feed.given_up else HEARTBEAT_SECONDS

    async def _heartbeat(self) -> None:
        """Ask a silent engine for its frames from the last one on: it answers with that alone if nothing was lost."""
        start, live = self.feed.heartbeat_from, self.feed.stats.last_frame_at
        if start is None:
            return
        epoch = self.feed.epoch
        async with self._shared.asking:
            reply = await self._fetch(start)
        if not reply.asked or self.feed.epoch != epoch or self.feed.stats.last_frame_at != live:
            return  # or the silence is over
        if reply.whole:
            self._safely(self.feed.heartbeat, reply.frames)
        else:
            self.feed.heartbeat_missed()
            self._log.warning("kv_events_heartbeat_missed", endpoint=self.source.replay_endpoint)
        self._note_state()

    async def _try_again(self) -> None:
        """Start over with a feed whose replay was given up, but only once the engine answers."""
        async with self._shared.replaying:
            if not self.feed.given_up:  # it may be complete by now
                return
            reply = await self._fetch(0)
            if reply.frames and self.feed.given_up:
                self.feed.start_over()
                reply.whole = False  # live frames that came meanwhile were not held: another round brings them
                await self._hand_over(reply, self.feed.epoch)
                self._note_state()

    async def replay(self) -> None:
        """Fetch what the feed asks for, in rounds with back-off; give up for now after some rounds without progress."""
        idle = 0
        while (start := self.feed.replay_from) is not None:
            epoch = self.feed.epoch
            async with self._shared.replaying:
                await self._hand_over(await self._fetch(start), epoch)
            if self.feed.replay_from != start:
                idle = 0
                continue
            idle += 1
            if idle < REPLAY_ATTEMPTS:
                await asyncio.sleep(0.2 * 2**idle)
                continue
            idle = 0  # the held frames may have a gap of their own
            self._log.warning("kv_events_replay_failed", endpoint=self.source.replay_endpoint)
            self._safely(self.feed.replay_failed)
            await self._catch_up()

    async def _hand_over(self, reply: Reply, epoch: int) -> None:
        """Hand the feed a replay that it asked for in `epoch`, as long as it still wants it; then have it catch up."""
        feed = self.feed
        async with self._shared.applying:
            for seq, payload in reply.frames:
                if feed.epoch != epoch:
                    break
                self._safely(feed.replayed, seq, payload, whole=False)
                await self._finish()
            if feed.epoch == epoch:
                self._safely(feed.replay_ended if reply.whole else feed.replay_broke_off)
        await self._catch_up()

    async def _catch_up(self) -> None:
        async with self._shared.applying:
            while self._safely(self.feed.catch_up, whole=False):
                await self._finish()

    async def _finish(self) -> None:
        """Apply what is left of a frame, and yield to the event loop."""
        await self._breathe()
        while self._safely(self.feed.go_on):
            await self._breathe()

    async def _breathe(self) -> None:
        """Yield to the event loop when the time slice is over."""
        if time.monotonic() > self._slice_ends:
            await asyncio.sleep(0)
            self._slice_ends = time.monotonic() + SLICE_SECONDS

    async def _fetch(self, start: int) -> Reply:
        """What the engine has from number `start` on; an empty reply if it cannot be asked."""
        if self.source.replay_endpoint is None:
            return Reply()
        try:
            reply = await fetch(self._shared.context, self._shared.drain, self.source.replay_endpoint, start)
        except zmq.ZMQError as error:
            if self._is_shortage(error):
                return Reply(asked=False)
            self._log.warning("kv_events_replay_refused", endpoint=self.source.replay_endpoint, error=str(error))
            return Reply()
        self.feed.stats.malformed += reply.malformed
        if not reply.whole:
            self._log.info("kv_events_replay_interrupted", frames=len(reply.frames), malformed=reply.malformed)
        return reply

    def _safely(self, step: Callable[_Step, bool | None], *args: _Step.args, **kwargs: _Step.kwargs) -> bool:
        """Let the feed take a step. False if the step returns it."""
        try:
            return step(*args, **kwargs) is not False
        except Exception:
            # Supervision boundary: an error over one frame must not stop the feed.
            log.exception("kv_events_frame_failed", pod=self.source.name)
            self.feed.failed_to_apply()
            return True
