"""What `make study` replays: every trace under several conditions, by every policy worth comparing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from matrixinfer.scheduler.policies import POLICIES as PROFILES
from matrixinfer.study.engine import EngineShape
from matrixinfer.study.faults import Fault
from matrixinfer.study.fleet import Fleet
from matrixinfer.study.policies import POLICIES
from matrixinfer.study.replay import Replay
from matrixinfer.study.trace import LetterBlocks, Trace

BOUNDS = ("pooled", "clairvoyant")
_LEFT_OUT = ("random", "least_load", "cache_aware", "longest_match", "power_of_two")
"""Policies that others cover, and one that breaks down wherever there is load."""
COMPARED: Sequence[str] = [name for name in POLICIES if name not in (*_LEFT_OUT, *BOUNDS)] + list(BOUNDS)
OURS: Sequence[str] = [name for name in PROFILES if name in COMPARED and name != "round_robin"]
DEFAULT = "kv_aware"
MOST: Sequence[str] = ("session_sticky", "prefix_hash", "sglang_cache_aware", "lmetric", DEFAULT)
"""What is compared where something happens to the fleet."""
USUAL = "usual"
_BUSY = 0.5
"""How busy the pods are meant to be, if every hit were found."""
_PODS = (4, 16)
_MOST_SCALE = 8.0
_LEAST_PROMPTS = 3
"""A cache holds at least so many of the longest requests: a smaller one would show preemptions, and little else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One way to replay a trace."""

    name: str
    summary: str
    cache: float = 0.5
    """The caches of all pods together, as a share of the trace's distinct tokens."""
    gateways: int = 1
    gossip: bool = False
    event_loss: float = 0.0
    faults: Sequence[str] = ()
    """As `Fault.parse` reads them, where `T` stands for a third of the trace's time."""
    policies: Sequence[str] = MOST


CONDITIONS: Sequence[Condition] = (
    Condition(name=USUAL, summary="caches for half of the distinct tokens, one gateway", policies=COMPARED),
    Condition(name="small caches", summary="caches for a quarter", cache=0.25, policies=COMPARED),
    Condition(name="large caches", summary="caches for twice as much", cache=2.0),
    Condition(name="2 gateways", summary="requests go to one of two at random", gateways=2),
    Condition(name="4 gateways", summary="requests go to one of four at random", gateways=4),
    Condition(name="4 that talk", summary="the same, and they tell each other their load", gateways=4, gossip=True),
    Condition(
        name="engine restart", summary="pod 0 is down for 30 s and has lost its cache", faults=("restart@T:0:30",)
    ),
    Condition(name="gateway restart", summary="the gateway forgets all, the engines do not", faults=("forget@T",)),
    Condition(name="event loss", summary="10 % of the event batches must be asked for", event_loss=0.1),
    Condition(name="slow pod", summary="pod 0 takes twice as long", faults=("slow@0:0:2",)),
    Condition(name="unequal caches", summary="pod 0 has a quarter of the cache", faults=("small@0:0:0.25",)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a trace needs, by a replay with one cache without bounds."""

    distinct_tokens: int
    longest: int
    """The longest prompt with its reply, in tokens."""
    busy_pods: float
    """Pods' time in steps, by the virtual time."""
    seconds: float
    rate_scale: float = 1.0
    """How much faster arrivals must come, so that the smallest fleet is half busy."""


def demand(trace: Trace, shape: EngineShape) -> Demand:
    """Find out what a trace needs, with arrivals as fast as the smallest fleet can take them."""
    recorded = _demand(trace, shape, 1.0)
    scale = min(_MOST_SCALE, round(_PODS[0] * _BUSY / recorded.busy_pods, 1))
    return recorded if scale <= 1.0 else _demand(trace, shape, scale)


def _demand(trace: Trace, shape: EngineShape, rate_scale: float) -> Demand:
    blocks = LetterBlocks()
    distinct: set[int] = set()
    for number, turn in enumerate(trace.turns):
        distinct.update(blocks.of_turn(number, turn))
    tokens = max(1, len(distinct)) * shape.block_size
    longest = max(turn.prompt + turn.reply for turn in trace.turns)
    room = tokens + 2 * longest + shape.block_size
    policy = POLICIES["pooled"]
    run = Replay(
        trace,
        Fleet(shape=shape, pods=8, pod_tokens=room, rate_scale=rate_scale),
        policy.make,
        publishes=False,
        shares_cache=True,
        blocks=blocks,
    )
    run.run()
    busy = sum(pod.engine.busy_seconds for pod in run.pods.values())
    return Demand(
        distinct_tokens=tokens, longest=longest, busy_pods=busy / run.now, seconds=run.now, rate_scale=rate_scale
    )


def fleet(trace: Trace, shape: EngineShape, needs: Demand, condition: Condition, *, seed: int = 0) -> Fleet:
    """The fleet for a trace under a condition: as many pods as keep it half busy, within bounds."""
    pods = min(max(math.ceil(needs.busy_pods / _BUSY), _PODS[0]), _PODS[1])
    tokens = math.ceil(condition.cache * needs.distinct_tokens / pods)
    third = f"{needs.seconds / 3:.0f}"
    return Fleet(
        shape=shape,
        pods=pods,
        pod_tokens=max(tokens, _LEAST_PROMPTS * needs.longest),
        rate_scale=needs.rate_scale,
        gateways=condition.gateways,
        gossip=condition.gossip,
        event_loss=condition.event_loss,
        faults=[Fault.parse(text.replace("@T", f"@{third}")) for text in condition.faults],
        seed=seed,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The results of one policy for one trace under one condition."""

    trace: str
    condition: str
    policy: str
    results: Mapping[str, float | int | None]

    def value(self, key: str) -> float:
        """A result; infinity where there is none."""
        value = self.results.get(key)
        return math.inf if value is None else float(value)


def regrets(cells: Sequence[Cell], key: str = "ttft_mean_s") -> dict[str, list[tuple[float, str, str]]]:
    """By policy, its result in multiples of the best one's, bounds left out, for each trace and condition; worst first."""
    found: dict[str, list[tuple[float, str, str]]] = {}
    for (trace, condition), group in grouped(cells).items():
        best = min((cell.value(key) for cell in group if cell.policy not in BOUNDS), default=math.inf)
        if not 0 < best < math.inf:
            continue
        for cell in group:
            found.setdefault(cell.policy, []).append((cell.value(key) / best, trace, condition))
    return {policy: sorted(each, reverse=True) for policy, each in found.items()}


def grouped(cells: Sequence[Cell]) -> Mapping[tuple[str, str], list[Cell]]:
    """The cells of each trace and condition."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.trace, cell.condition), []).append(cell)
    return MappingProxyType(groups)


def geometric_mean(values: Sequence[float]) -> float:
    """Of values above 0."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan
