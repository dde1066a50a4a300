"""Engine events, from raw frames into an index, by block sizes and layout of the frames."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

from bench.feed import Frames, Recording, record
from bench.measure import Figure, Scale
from bench.prompts import MODEL
from matrixinfer.blocks import Medium, TokenBlockProcessor
from matrixinfer.index.base import BlockIndex
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.wire import BlockStored, decode, tokens_of

_TARGET_US = 2.0
"""Per engine block of 16 tokens into an index of 128: half a million blocks per second."""

_STAGE_ROUNDS = 2
"""Rounds in which the stages are measured alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    engine: int
    """Tokens per engine block."""
    index: int
    """Tokens per block of the index."""
    arrays: bool = False
    target: float | None = None

    @property
    def name(self) -> str:
        return f"{self.engine} into {self.index}{', arrays' if self.arrays else ''}"


_SHAPES = (
    _Shape(engine=16, index=128, target=_TARGET_US),
    _Shape(engine=16, index=128, arrays=True, target=_TARGET_US),
    _Shape(engine=16, index=16),
    _Shape(engine=32, index=48),
    _Shape(engine=128, index=128),
)


class _TimedBlocks(TokenBlockProcessor):
    """Measures the time spent hashing."""

    __slots__ = ("seconds",)

    def __init__(self, block_size: int) -> None:
        super().__init__(block_size)
        self.seconds = 0.0

    def hashes(
        self, data: bytes | bytearray | memoryview, parent: int | None = None, media: Sequence[Medium] = ()
    ) -> list[int]:
        start = perf_counter()
        named = super().hashes(data, parent, media)
        self.seconds += perf_counter() - start
        return named

    def tail(self, data: bytes | bytearray | memoryview, parent: int, media: Sequence[Medium] = ()) -> int:
        start = perf_counter()
        name = super().tail(data, parent, media)
        self.seconds += perf_counter() - start
        return name


@dataclass(slots=True)
class _Best:
    """Seconds that one phase, and its stages, took in their best rounds."""

    total: float = float("inf")
    hash: float = float("inf")
    decode: float = float("inf")
    tokens: float = float("inf")


def run(scale: Scale) -> Iterator[Figure]:
    """Time per engine block while a cache fills and while it turns over. Rounds of the shapes alternate."""
    recordings = {size: record(scale.engine_blocks * 16 // size, block_tokens=size) for size in (16, 32, 128)}
    phases = {shape: _phases(shape, recordings[shape.engine]) for shape in _SHAPES}
    best = {shape: {name: _Best() for name in phases[shape]} for shape in _SHAPES}
    for number in range(scale.feed_rounds):
        for shape in _SHAPES:
            _round(shape, phases[shape], best[shape])
            for name, frames in phases[shape].items() if number < _STAGE_ROUNDS else ():
                _time_stages(frames, best[shape][name])
    for shape in _SHAPES:
        for name, frames in phases[shape].items():
            yield from _figures(f"{shape.name}, {name}", best[shape][name], frames, shape.target)


def _phases(shape: _Shape, recording: Recording) -> dict[str, Frames]:
    phases = {"filling": recording.filling, "turnover": recording.turnover}
    return {name: frames.as_arrays() for name, frames in phases.items()} if shape.arrays else phases


def _round(shape: _Shape, phases: Mapping[str, Frames], best: Mapping[str, _Best]) -> None:
    blocks = _TimedBlocks(shape.index)
    feed = new_feed("pod", blocks, MemoryIndex())
    for name, frames in phases.items():
        _time_phase(feed, blocks, frames, best[name])
    _check(feed, phases.values())


def _time_phase(feed: PodFeed, blocks: _TimedBlocks, frames: Frames, best: _Best) -> None:
    start, blocks.seconds = perf_counter(), 0.0
    apply(feed, frames.payloads)
    total = perf_counter() - start
    if total < best.total:
        best.total, best.hash = total, blocks.seconds


def _time_stages(frames: Frames, best: _Best) -> None:
    start = perf_counter()
    for payload in frames.payloads:
        decode(payload)
    best.decode = min(best.decode, perf_counter() - start)
    stored = [
        event for payload in frames.payloads for event in decode(payload).events if isinstance(event, BlockStored)
    ]
    start = perf_counter()
    for event in stored:
        tokens_of(event)
    best.tokens = min(best.tokens, perf_counter() - start)


def _figures(case: str, best: _Best, frames: Frames, target: float | None) -> Iterator[Figure]:
    other = best.total - best.decode - best.tokens - best.hash
    stages = {"decode": best.decode, "tokens": best.tokens, "hash": best.hash, "other": other}
    for name, seconds in stages.items():
        yield Figure(case=case, name=name, value=seconds / frames.blocks * 1e6, unit="µs")
    yield Figure(case=case, name="total", value=best.total / frames.blocks * 1e6, unit="µs", target=target)
    yield Figure(case=case, name="hash share", value=best.hash / best.total * 100, unit="%")
    yield Figure(case=case, name="rate", value=frames.blocks / best.total / 1e6, unit="M blocks/s")
    yield Figure(case=case, name="frame", value=best.total / len(frames.payloads) * 1e6, unit="µs")
    yield Figure(case=case, name="blocks", value=frames.blocks / len(frames.payloads), unit="per frame")


def new_feed(pod: str, blocks: TokenBlockProcessor, index: BlockIndex) -> PodFeed:
    """An empty feed that expects frames from the first on."""
    return PodFeed(Ledger(pod=pod, model=MODEL, blocks=blocks, index=index), can_replay=False)


def apply(feed: PodFeed, payloads: Iterable[bytes]) -> None:
    """Apply the next payloads to the feed."""
    for seq, payload in enumerate(payloads, feed.stats.frames):
        feed.live(seq, payload)


def _check(feed: PodFeed, phases: Collection[Frames]) -> None:
    """Fail when the result is wrong: a figure for it would mean nothing."""
    stats = feed.ledger.stats
    assert stats.stored == sum(frames.stored for frames in phases), stats
    assert stats.removed == sum(frames.removed for frames in phases), stats
    assert stats.orphans + stats.unknown_removed + stats.misfits == 0, stats
