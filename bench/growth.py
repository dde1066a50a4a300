"""Ledgers and index as they grow: memory per block, and the longest time that a single frame takes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from bench.feed import record
from bench.ingest import apply, new_feed
from bench.measure import Figure, Scale, in_fresh_process, peak_bytes, resident_bytes
from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.sim.events import BlockStored, EventBatch, encode

_TARGET_BYTES, _TARGET_MS = 150.0, 5.0
_FLEET = 8
_STEP_BLOCKS, _STEPS = 128, 8  # steps of 2,048 tokens, eight to a prompt
_PHASES = ("filling", "turnover")


def run(scale: Scale) -> Iterator[Figure]:
    """Memory of one pod and of a fleet, then the longest frame while an index grows, and while a ledger grows."""
    yield from _memory("1 pod", 1, scale.engine_blocks)
    yield from _memory(f"{_FLEET} pods", _FLEET, scale.engine_blocks // 4)
    grown = scale.index_blocks
    for case, pods, blocks, index_tokens in (
        (f"index to {grown:,} blocks", 10, grown // 10, 16),
        (f"ledger to {grown // 2:,} blocks", 1, grown // 2, 128),
    ):
        rounds = [in_fresh_process(frame_times, pods, blocks, index_tokens) for _ in range(scale.feed_rounds)]
        frames = [min(times) * 1e3 for times in zip(*rounds, strict=True)]
        yield Figure(case=case, name="longest frame", value=max(frames), unit="ms", target=_TARGET_MS)
        yield Figure(case=case, name="median frame", value=median(frames), unit="ms")


def _memory(case: str, pods: int, blocks: int) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        for pod in range(pods):
            recording = record(blocks, pod=pod)
            for name in _PHASES:
                _write(Path(folder, f"{name}-{pod}"), getattr(recording, name).payloads)
        after, peak, engine_blocks, index_blocks = in_fresh_process(memory, Path(folder), pods)
    for name, cost in zip(_PHASES, after, strict=True):
        yield Figure(case=case, name=f"after {name}", value=cost, unit="B", target=_TARGET_BYTES)
    yield Figure(case=case, name="peak", value=peak, unit="B")
    yield Figure(case=case, name="engine blocks", value=engine_blocks / 1e3, unit="k")
    yield Figure(case=case, name="index blocks", value=index_blocks / 1e3, unit="k")


def memory(folder: Path, pods: int) -> tuple[list[float], float, int, int]:
    """Growth of this process in bytes per engine block and pod: after each phase, and at its peak.

    Also returns the engine blocks in the ledgers at the end, and the distinct blocks in the index.
    """
    blocks, index = TokenBlockProcessor(128), MemoryIndex()
    feeds = [new_feed(f"pod-{pod}", blocks, index) for pod in range(pods)]
    before = resident_bytes()
    after = []
    for name in _PHASES:
        sources = [(feed, _read(folder / f"{name}-{pod}")) for pod, feed in enumerate(feeds)]
        while sources:  # one frame of each pod in turn
            sources = [(feed, payloads) for feed, payloads in sources if _apply_one(feed, payloads)]
        held = sum(len(feed.ledger) for feed in feeds)
        after.append((resident_bytes() - before) / held)
    return after, (peak_bytes() - before) / held, held, index.stats().blocks


def frame_times(pods: int, blocks: int, index_tokens: int) -> list[float]:
    """Seconds that each frame takes while `pods` pods, one after the other, store `blocks` engine blocks each."""
    processor, index = TokenBlockProcessor(index_tokens), MemoryIndex()
    feeds = [new_feed(f"pod-{pod}", processor, index) for pod in range(pods)]
    times = []
    for pod, feed in enumerate(feeds):
        for seq, payload in enumerate(_prefills(blocks, pod)):
            start = perf_counter()
            feed.live(seq, payload)
            times.append(perf_counter() - start)
        assert len(feed.ledger) == blocks // _STEP_BLOCKS * _STEP_BLOCKS, feed.ledger.stats
    return times


def _prefills(blocks: int, seed: int) -> Iterator[bytes]:
    """One frame per step: blocks of 16 random tokens, in prompts without common prefixes."""
    draw = np.random.default_rng(seed)
    parent = None
    for step in range(blocks // _STEP_BLOCKS):
        hashes = draw.integers(1 << 63, size=_STEP_BLOCKS, dtype=np.uint64).tolist()
        stored = BlockStored(
            block_hashes=hashes,
            parent_block_hash=parent if step % _STEPS else None,
            token_ids=draw.integers(150_000, size=_STEP_BLOCKS * 16).tolist(),
            block_size=16,
            extra_keys=[None] * _STEP_BLOCKS,
        )
        yield encode(EventBatch(ts=0.0, events=[stored]))
        parent = hashes[-1]


def _apply_one(feed: PodFeed, payloads: Iterator[bytes]) -> bool:
    """Apply the next payload. Returns False when there is none."""
    for payload in payloads:
        apply(feed, [payload])
        return True
    return False


def _write(path: Path, payloads: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        for payload in payloads:
            file.write(len(payload).to_bytes(4, "big") + payload)


def _read(path: Path) -> Iterator[bytes]:
    """One payload at a time, so that the file does not count as memory of the index."""
    with path.open("rb") as file:
        while size := file.read(4):
            yield file.read(int.from_bytes(size, "big"))
