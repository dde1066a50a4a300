"""The engine of replays against the engine model of the simulator: the same times, hits and changes of the cache."""

from __future__ import annotations

import math
import random
from collections import deque
from typing import Any

import numpy as np
import pytest

from matrixinfer.sim.cache import PagedPrefixCache
from matrixinfer.sim.events import BlockRemoved, BlockStored
from matrixinfer.sim.model import EngineModel, EngineRequest, Timing
from matrixinfer.study.engine import Engine, EngineShape, Run, Stored
from matrixinfer.study.pool import Pool

TIMING = Timing(
    step=0.004, prefill_token=0.0001, decode_sequence=0.0002, attention_pair=1e-8, decode_context=4e-7, load_block=0.0
)
BLOCK = 4


class Workload:
    """Random prompts over few prefixes, with replies; arrivals in bursts."""

    def __init__(self, seed: int, *, requests: int, longest: int) -> None:
        rng = random.Random(seed)
        self.arrivals: list[tuple[float, list[int], list[int]]] = []
        known: list[list[int]] = []
        now = 0.0
        for _ in range(requests):
            now += rng.choice([0.0, 0.001, 0.05, 0.4, 2.0]) * rng.random()
            prompt = list(rng.choice(known))[: rng.randrange(1, longest)] if known and rng.random() < 0.7 else []
            prompt += [rng.randrange(1000) for _ in range(rng.randrange(1, max(2, longest - len(prompt))))]
            reply = [rng.randrange(1000) for _ in range(rng.choice([1, 2, 3, 9, 40]))]
            known = [*known, prompt + reply][-12:]
            self.arrivals.append((now, prompt, reply))


def by_model(work: Workload, blocks: int, **shape: int) -> dict[str, Any]:
    model = EngineModel(PagedPrefixCache(blocks + 1, BLOCK), TIMING, **shape)
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    cached: dict[int, int] = {}
    cache: list[tuple[float, list[int] | int]] = []
    now, at = 0.0, 0
    while at < len(work.arrivals) or model.busy:
        if not model.busy:
            now = max(now, work.arrivals[at][0])
        while at < len(work.arrivals) and work.arrivals[at][0] <= now:
            _, prompt, reply = work.arrivals[at]
            model.submit(EngineRequest(id=at, prompt=np.array(prompt, np.uint32), reply=reply))
            at += 1
        result = model.step()
        now += result.duration
        for output in result.outputs:
            first.setdefault(output.request_id, now)
            cached[output.request_id] = output.cached_tokens
            if output.finished:
                last[output.request_id] = now
        for event in result.events:
            if isinstance(event, BlockStored):
                cache.append((now, event.block_hashes))
            elif isinstance(event, BlockRemoved):
                cache += [(now, block) for block in event.block_hashes]
    return {"first": first, "last": last, "cached": cached, "cache": cache, "preemptions": model.stats.preemptions}


def by_engine(work: Workload, blocks: int, **shape: int) -> dict[str, Any]:
    engine = Engine(EngineShape(block_size=BLOCK, timing=TIMING, **shape), Pool(blocks))
    reference = PagedPrefixCache(2, BLOCK)
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    cached: dict[int, int] = {}
    cache: list[tuple[float, list[int] | int]] = []
    arrivals = deque(enumerate(work.arrivals))
    hashes: dict[int, list[int]] = {}

    def submit(until: float) -> None:
        while arrivals and arrivals[0][1][0] <= until:
            number, (when, prompt, reply) = arrivals.popleft()
            hashes[number] = list(reference.sequence(np.array(prompt + reply, np.uint32)).hashes)
            engine.submit(Run(number, len(prompt), len(reply), hashes[number]), when)

    while arrivals or engine.ends_at < math.inf:
        if engine.ends_at == math.inf:
            now = arrivals[0][1][0]
            submit(now)
        elif arrivals and arrivals[0][1][0] < engine.ends_at:
            submit(arrivals[0][1][0])
            continue
        else:
            now = engine.ends_at
            end = engine.finish()
            for run in end.first:
                first[run.owner] = now
                cached[run.owner] = run.cached or 0
            for run in end.finished:
                last[run.owner] = now
            for change in end.stored:
                if isinstance(change, Stored):
                    cache.append((now, hashes[change.owner][change.first : change.last]))
                else:
                    cache.append((now, change))
            submit(now)
        engine.start(now)
    return {"first": first, "last": last, "cached": cached, "cache": cache, "preemptions": engine.preemptions}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("blocks", "shape"),
    [
        (2_000, {}),
        (60, {}),
        (30, {"max_tokens": 16, "max_sequences": 6}),
        (200, {"max_tokens": 40, "max_sequences": 3}),
    ],
)
def test_it_schedules_hits_evicts_and_publishes_as_the_engine_model_does(
    seed: int, blocks: int, shape: dict[str, int]
) -> None:
    work = Workload(seed, requests=120, longest=min(blocks * BLOCK - 50, 150))
    model, engine = by_model(work, blocks, **shape), by_engine(work, blocks, **shape)
    assert engine["preemptions"] == model["preemptions"]
    assert engine["cached"] == model["cached"]
    assert engine["first"] == pytest.approx(model["first"])
    assert engine["last"] == pytest.approx(model["last"])
    assert [what for _, what in engine["cache"]] == [what for _, what in model["cache"]]
    assert [when for when, _ in engine["cache"]] == pytest.approx([when for when, _ in model["cache"]])


def test_the_small_caches_of_these_workloads_preempt() -> None:
    work = Workload(3, requests=120, longest=70)
    assert by_model(work, 30, max_tokens=16, max_sequences=6)["preemptions"]
