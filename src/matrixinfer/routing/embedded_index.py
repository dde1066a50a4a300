"""`matrixinfer.Index`: which pod holds which block, for programs that receive the engines' KV events themselves.

No sockets, no threads, no clock: bytes in, answers out. The caller passes each frame in, and asks what to do next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ParamSpec

from matrixinfer.blocks import Scheme, TokenBlockProcessor
from matrixinfer.errors import ConfigError, UnknownPod
from matrixinfer.index.base import IndexStats
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.feed import REPLAY_ATTEMPTS, PodFeed
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.routing import arguments
from matrixinfer.routing.embedded_lookup import Known, Tokens
from matrixinfer.scheduler.framework import Trust
from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.trust.cache_views import FeedCaches
from matrixinfer.trust.levels import trust_in

_Step = ParamSpec("_Step")


@dataclass(frozen=True, slots=True, kw_only=True)
class PodStatus:
    """What an index knows about one pod's KV events."""

    trust: Trust
    """How far its blocks are believed."""
    feed: str
    """State of the feed: `syncing`, `complete`, `partial`, `stale` or `untrusted`."""
    untrusted: str | None
    """Why the engine's events do not say what it holds; None where they do."""
    model: str
    engine_block: int | None
    """Tokens per block of the engine's cache; None before its first event."""
    frames: int
    malformed: int
    """Frames that are no batch of events, or that could not be applied."""
    gaps: int
    restarts: int


class Replay:
    """A question for an engine: which batches has it published from number `start` on? `Index` makes these.

    Send `start` to the engine's replay socket and hand the answer to `Index.replayed`.
    """

    __slots__ = ("_epoch", "_feed", "_frames", "is_heartbeat", "pod", "start")

    def __init__(self, pod: str, start: int, feed: PodFeed, *, is_heartbeat: bool) -> None:
        self.pod = pod
        self.start = start
        self.is_heartbeat = is_heartbeat
        self._feed = feed
        self._epoch = feed.epoch
        self._frames = feed.stats.frames

    def __repr__(self) -> str:
        return f"<Replay pod={self.pod!r} start={self.start}>"

    def is_open(self, feed: PodFeed | None) -> bool:
        """Whether `feed` still waits for the answer. A heartbeat is void once a frame has come."""
        if feed is None or feed is not self._feed or feed.epoch != self._epoch:
            return False
        return feed.stats.frames == self._frames if self.is_heartbeat else feed.replay_from is not None


class Index:
    """Which pod holds which block, kept from the frames that engines publish.

    `block_size` and `scheme` say how prompts are cut into blocks and named; engines may use blocks of any other size.
    `max_blocks` bounds the distinct blocks over all pods. `max_recent_blocks` bounds the blocks that are remembered
    because they were sent to pods whose events do not say everything. Raises `ConfigError` for a value that does not fit.

    Not thread-safe: hold one lock around all calls to an index and its selectors, or use them from one thread.
    """

    def __init__(
        self,
        *,
        block_size: int = 128,
        scheme: Scheme = "prefix",
        max_blocks: int = 4_000_000,
        max_recent_blocks: int = 1_000_000,
    ) -> None:
        try:
            blocks = TokenBlockProcessor(arguments.count(block_size, "block_size", least=1), scheme)
        except ValueError as error:
            raise ConfigError("Index", str(error)) from error
        most = arguments.count(max_blocks, "max_blocks", least=1)
        memory = MemoryIndex(max_blocks=most, prefix_closed=scheme == "prefix")
        history = RoutingHistory(arguments.count(max_recent_blocks, "max_recent_blocks", least=0))
        self._feeds: dict[str, PodFeed] = {}
        self._follows: dict[str, _Follow] = {}
        self.known = Known(blocks=blocks, memory=memory, caches=FeedCaches(self._feeds), history=history)
        """What selectors read; not for other callers."""

    # Pods

    @property
    def pods(self) -> Sequence[str]:
        """The pods that are followed."""
        return list(self._feeds)

    def follow(self, pod: str, *, model: str, can_replay: bool = False) -> None:
        """Expect frames of `pod`, whose blocks are of `model` (blocks of an adapter go under the adapter's name).

        `can_replay` says that its engine can be asked for past batches; then `wanted` asks for them at once, and after
        every loss. Without, the pod is `partial` until its first batch or its next AllBlocksCleared. A pod that is
        followed in another way begins again; in the same way, nothing changes. Raises `InvalidRequest` for a name that
        cannot be used.
        """
        arguments.pod_name(pod)
        follow = _Follow(model=arguments.text(model, "model"), can_replay=can_replay)
        if self._follows.get(pod) == follow:
            return
        self.forget(pod)
        known = self.known
        self._follows[pod] = follow
        ledger = Ledger(pod=pod, model=model, blocks=known.blocks, index=known.memory, history=known.history)
        self._feeds[pod] = PodFeed(ledger, can_replay=can_replay)

    def forget(self, pod: str) -> None:
        """Forget a pod that has gone. Does nothing if the pod is not followed."""
        self.known.history.forget(pod)
        feed = self._feeds.pop(pod, None)
        if feed is None:
            return
        del self._follows[pod]
        feed.ledger.reset()
        self.known.memory.forget(pod)

    def trust(self, pod: str) -> Trust:
        """How far the pod's blocks are believed: `exact`, `partial`, `stale`, or `none` when it is not followed."""
        return trust_in(self._feeds.get(pod), doubted=False)

    def status(self, pod: str) -> PodStatus:
        """What is known about the pod's events. Raises `UnknownPod`."""
        feed = self._feed(pod)
        return PodStatus(
            trust=self.trust(pod),
            feed=feed.state.value,
            untrusted=feed.untrusted,
            model=feed.ledger.model,
            engine_block=feed.ledger.block_size,
            frames=feed.stats.frames,
            malformed=feed.stats.malformed,
            gaps=feed.stats.gaps,
            restarts=feed.stats.restarts,
        )

    # Frames

    def apply(self, pod: str, seq: int, payload: bytes) -> None:
        """Apply a frame from the pod's live socket: its number, and its payload.

        Raises `UnknownPod`, and `InvalidRequest` if these are not a number of 64 bits and bytes.

        A frame that cannot be read raises nothing. It may have removed any block, so the pod's blocks are dropped, its
        trust falls, and `status` counts the frame.
        """
        feed = self._feed(pod)
        _step(feed, feed.live, *arguments.frame(seq, payload))

    def wanted(self, pod: str) -> Replay | None:
        """What the pod's engine must be asked for now; None when nothing is missing. Raises `UnknownPod`."""
        feed = self._feed(pod)
        start = feed.replay_from
        return None if start is None else Replay(pod, start, feed, is_heartbeat=False)

    def heartbeat(self, pod: str) -> Replay | None:
        """What to ask an engine that has been silent for some time, to learn whether its last frames were lost.

        None while there is nothing to ask. Ask every ten seconds of silence. Raises `UnknownPod`.
        """
        feed = self._feed(pod)
        start = feed.heartbeat_from
        return None if start is None else Replay(pod, start, feed, is_heartbeat=True)

    def replayed(self, replay: Replay, frames: Iterable[tuple[int, bytes]], *, whole: bool = True) -> None:
        """An engine answered `replay` with `frames`, pairs of number and payload, in order.

        `whole` says that its end marker came. An engine that cannot be reached answers `[]` with `whole=False`; after
        three such answers in a row `wanted` stops asking, and the pod continues as `partial`. Answers to questions that
        have been overtaken are ignored. Raises `InvalidRequest` at a frame that is not a number of 64 bits and bytes; the
        question stays open then.
        """
        feed = self._feeds.get(replay.pod)
        if feed is None or not replay.is_open(feed):
            return
        if not replay.is_heartbeat:
            self._replay(replay.pod, feed, frames, whole=whole)
        elif whole:
            _step(feed, feed.heartbeat, list(arguments.frames(frames)))
        else:
            feed.heartbeat_missed()

    def disconnected(self, pod: str) -> None:
        """The connection to the pod's live socket is lost: its blocks are `stale`. Raises `UnknownPod`."""
        self._feed(pod).disconnected()

    def reconnected(self, pod: str) -> None:
        """The connection is back. `wanted` asks for what was missed; without replay the pod begins again."""
        self._feed(pod).reconnected()

    def resync(self, pod: str) -> None:
        """Drop the pod's blocks, because you doubt them, and fetch its history again if it can be replayed."""
        self._feed(pod).start_over()

    # Answers

    def match(self, token_ids: Tokens, *, model: str, salt: str | None = None) -> dict[str, int]:
        """How many blocks of a prompt each pod holds, consecutively from its start. Pods that hold none are absent.

        Raises `InvalidRequest` for token ids, a model or a salt that cannot be used.
        """
        counts = self.known.memory.count(arguments.text(model, "model"), self.known.chain(token_ids, salt=salt))
        return {pod: count for pod, count in counts.items() if pod in self._feeds}

    def stats(self) -> IndexStats:
        """Blocks, pods that hold any, evictions, and memory in bytes (that of each pod's ledger not counted)."""
        return self.known.memory.stats()

    def _feed(self, pod: str) -> PodFeed:
        feed = self._feeds.get(pod)
        if feed is None:
            raise UnknownPod(f"the index follows no pod `{pod}`: call `follow` first")
        return feed

    def _replay(self, pod: str, feed: PodFeed, frames: Iterable[tuple[int, bytes]], *, whole: bool) -> None:
        epoch, start, follow = feed.epoch, feed.replay_from, self._follows[pod]
        for seq, payload in arguments.frames(frames):
            if feed.epoch != epoch:
                break
            _step(feed, feed.replayed, seq, payload)
        if feed.epoch == epoch:
            _step(feed, feed.replay_ended if whole else feed.replay_broke_off)
        follow.idle = follow.idle + 1 if feed.replay_from == start else 0
        if follow.idle >= REPLAY_ATTEMPTS:
            follow.idle = 0
            _step(feed, feed.replay_failed)
        while _step(feed, feed.catch_up):
            pass


@dataclass(slots=True, kw_only=True)
class _Follow:
    """How a pod is followed."""

    model: str
    can_replay: bool
    idle: int = field(default=0, compare=False)
    """Answers in a row that brought nothing."""


def _step(feed: PodFeed, step: Callable[_Step, bool | None], *args: _Step.args, **kwargs: _Step.kwargs) -> bool:
    """Let the feed take a step; False when the step says so."""
    try:
        return step(*args, **kwargs) is not False
    except Exception:  # noqa: BLE001  # Supervision boundary: a fault over one frame must not stop the feed.
        feed.failed_to_apply()
        return True
