"""Engine events: from raw frames of 16-token blocks into an index of 128-token blocks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import perf_counter

from bench.feed import Frames, record
from bench.measure import Figure, Scale, in_fresh_process, resident_bytes
from bench.prompts import MODEL
from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.kvevents.ledger import Ledger


def run(scale: Scale) -> Iterator[Figure]:
    """Rates while a cache fills and while it turns over, and what its blocks cost in memory."""
    phases = dict(zip(("filling", "turnover"), record(scale.engine_blocks), strict=True))
    best = dict.fromkeys(phases, float("inf"))
    for _ in range(scale.rounds):
        feed = _feed()
        for seq_base, (name, frames) in zip((0, len(phases["filling"].payloads)), phases.items(), strict=True):
            start = perf_counter()
            _apply(feed, frames.payloads, seq_base)
            best[name] = min(best[name], perf_counter() - start)
        _check(feed, list(phases.values()))
    for name, frames in phases.items():
        blocks = frames.stored + frames.removed
        yield Figure(case=name, name="rate", value=blocks / best[name] / 1e6, unit="M engine blocks/s")
        yield Figure(case=name, name="per frame", value=best[name] / len(frames.payloads) * 1e6, unit="µs")
        yield Figure(case=name, name="blocks per frame", value=blocks / len(frames.payloads), unit="")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frames"
        _write(path, phases["filling"].payloads)
        yield Figure(case="filling", name="memory per block", value=in_fresh_process(memory, path), unit="B")


def memory(path: Path) -> float:
    """Bytes of this process's memory per engine block of ledger and index together."""
    feed = _feed()
    before = resident_bytes()
    _apply(feed, _read(path), 0)
    return (resident_bytes() - before) / len(feed.ledger)


def _feed() -> PodFeed:
    ledger = Ledger(pod="pod", model=MODEL, blocks=TokenBlockProcessor(128), index=MemoryIndex())
    return PodFeed(ledger, can_replay=False)


def _apply(feed: PodFeed, payloads: Iterable[bytes], first: int) -> None:
    for seq, payload in enumerate(payloads, first):
        feed.live(seq, payload)


def _check(feed: PodFeed, phases: list[Frames]) -> None:
    """What is fast but wrong must not be reported."""
    stats = feed.ledger.stats
    assert (stats.stored, stats.removed) == tuple(sum(getattr(p, key) for p in phases) for key in ("stored", "removed"))
    assert stats.orphans + stats.unknown_removed + stats.misfits == 0, stats


def _write(path: Path, payloads: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        for payload in payloads:
            file.write(len(payload).to_bytes(4, "big") + payload)


def _read(path: Path) -> Iterator[bytes]:
    """One payload at a time, so that the file does not count as memory of the index."""
    with path.open("rb") as file:
        while size := file.read(4):
            yield file.read(int.from_bytes(size, "big"))
