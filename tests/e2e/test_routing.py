"""Both sides of KV-aware routing at once: it keeps prompts on their warm pod, and it keeps the fleet balanced.

Long sessions that share a prefix with everything else run through the real gateway against simulated engines, and,
for comparison, straight to the engines by session hash: the best that affinity alone can do.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
import numpy.typing as npt
import pytest

from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.model import Timing
from tests.virtual_time import VirtualTimeLoop

from .fleet import Fleet, virtual_fleet

pytestmark = [pytest.mark.slow, pytest.mark.virtual_time]

PODS = 4
SHARED, TURN, TURNS, REPLY = 15_000, 10_500, 8, 8
TIMING = Timing(step=0.003, prefill_token=0.00003, decode_sequence=0.0003)
ENGINE = SimEngineConfig(model="m", block_size=16, num_blocks=60_000, timing=TIMING)
SECONDS_PER_SESSION = TURN * TURNS * TIMING.prefill_token
SESSIONS = 14
THINK_SECONDS = 0.6


@dataclass
class Session:
    """A conversation in token ids that grows from the prefix shared by all to about 100,000 tokens."""

    number: int
    starts_after: float
    tokens: npt.NDArray[np.uint32]
    draw: np.random.Generator

    def next_prompt(self) -> list[int]:
        self.tokens = np.concatenate([self.tokens, self.draw.integers(0, 100_000, TURN, dtype=np.uint32)])
        prompt: list[int] = self.tokens.tolist()
        return prompt


@dataclass
class Seen:
    pods: Counter[str] = field(default_factory=Counter)
    by_session: dict[int, list[str]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    """Until each answer was complete; it has few tokens, so nearly all of that is the time to its first one."""


def sessions(load: float) -> list[Session]:
    """Sessions that arrive at random so that their new tokens are `load` of what the fleet can prefill."""
    draw = random.Random(7)
    shared = np.random.default_rng(0).integers(0, 100_000, SHARED, dtype=np.uint32)
    ramp = SESSIONS * SECONDS_PER_SESSION / (PODS * load) if load else 0.0
    return [
        Session(number=i, starts_after=draw.uniform(0, ramp), tokens=shared, draw=np.random.default_rng(i + 1))
        for i in range(SESSIONS)
    ]


async def hold(target: Fleet, session: Session, seen: Seen, *, by_hash: bool, turns: int = TURNS) -> None:
    engine = session.number * 2_654_435_761 % 2**32 % PODS
    for turn in range(turns):
        if turn:
            await asyncio.sleep(THINK_SECONDS)
        body = {"model": "m", "prompt": session.next_prompt(), "max_tokens": REPLY}
        sent = asyncio.get_running_loop().time()
        _, pod = await target.post("/v1/completions", body, to=target.engines[engine].url if by_hash else None)
        seen.seconds.append(asyncio.get_running_loop().time() - sent)
        seen.pods[pod or f"pod-{engine}"] += 1
        seen.by_session.setdefault(session.number, []).append(pod or f"pod-{engine}")


async def run(loop: VirtualTimeLoop, tokenizer: LocalTokenizer, load: float, *, by_hash: bool) -> tuple[float, Seen]:
    seen = Seen()

    async def arrive(target: Fleet, session: Session) -> None:
        await asyncio.sleep(session.starts_after)
        await hold(target, session, seen, by_hash=by_hash)

    async with virtual_fleet(loop, tokenizer, ENGINE, pods=PODS) as target:
        async with asyncio.TaskGroup() as group:
            for session in sessions(load):
                group.create_task(arrive(target, session))
        return target.hit_rate(), seen


@pytest.mark.parametrize("load", [0.5, 0.8])
async def test_under_load_hits_stay_near_session_hashing_and_no_pod_is_overloaded(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer, load: float
) -> None:
    by_hash, hashed = await run(loop, tokenizer, load, by_hash=True)
    routed, seen = await run(loop, tokenizer, load, by_hash=False)
    fair = SESSIONS * TURNS / PODS
    mean, mean_hashed = fmean(seen.seconds), fmean(hashed.seconds)
    print(f"load {load}: hit rate {routed:.3f}, session hash {by_hash:.3f}, requests per pod {dict(seen.pods)}")
    print(f"load {load}: mean {mean:.3f} s, session hash {mean_hashed:.3f} s")
    assert mean < 1.1 * mean_hashed
    assert routed > by_hash - 0.05
    assert max(seen.pods.values()) <= 2 * fair


async def test_on_an_idle_fleet_every_session_stays_on_its_warm_pod(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer
) -> None:
    seen = Seen()
    async with virtual_fleet(loop, tokenizer, ENGINE, pods=PODS) as target:
        for session in sessions(0.0)[:3]:
            await hold(target, session, seen, by_hash=False, turns=4)
    assert all(len(set(pods)) == 1 for pods in seen.by_session.values()), seen.by_session


@pytest.mark.parametrize("load", [0.5, 0.8])
async def test_one_prefix_shared_by_everything_does_not_draw_everything_to_one_pod(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer, load: float
) -> None:
    requests, unique = 100, 5_000
    by_hash, _ = await run_universal(loop, tokenizer, load, requests, unique, by_hash=True)
    routed, seen = await run_universal(loop, tokenizer, load, requests, unique, by_hash=False)
    print(f"load {load}: hit rate {routed:.3f}, by hash {by_hash:.3f}, requests per pod {dict(seen)}")
    assert routed > by_hash - 0.03
    assert len(seen) == PODS
    assert max(seen.values()) <= 2 * requests / PODS


async def run_universal(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer, load: float, requests: int, unique: int, *, by_hash: bool
) -> tuple[float, Counter[str]]:
    """Requests that share their first tokens with all others and continue alone."""
    draw, arrivals = np.random.default_rng(3), random.Random(5)
    shared = draw.integers(0, 100_000, SHARED).tolist()
    seconds = requests * unique * TIMING.prefill_token / (PODS * load)
    seen: Counter[str] = Counter()

    async def one(target: Fleet, number: int, after: float) -> None:
        await asyncio.sleep(after)
        body = {"model": "m", "prompt": [*shared, *draw.integers(0, 100_000, unique).tolist()], "max_tokens": REPLY}
        _, pod = await target.post("/v1/completions", body, to=target.engines[number % PODS].url if by_hash else None)
        seen[str(pod)] += 1

    async with virtual_fleet(loop, tokenizer, ENGINE, pods=PODS) as target:
        async with asyncio.TaskGroup() as group:
            for number in range(requests):
                group.create_task(one(target, number, arrivals.uniform(0, seconds)))
        return target.hit_rate(), seen
