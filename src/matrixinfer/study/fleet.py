"""A fleet that traces are replayed on: how it is described, its pods, and what is seen of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matrixinfer.study.engine import Engine, EngineShape
from matrixinfer.study.faults import Fault
from matrixinfer.study.publisher import Publisher


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What the trace is replayed on."""

    shape: EngineShape
    pods: int = 8
    pod_tokens: int = 1_000_000
    """Tokens that one pod's KV cache holds."""
    gateways: int = 1
    gossip: bool = False
    """Gateways report to each other what they have in flight, as they do over a shared Redis."""
    shared_index: bool = False
    """Gateways look up in one index, as in a shared Redis, instead of following the engines themselves."""
    rate_scale: float = 1.0
    """Arrivals come so many times as fast. Times between an answer and the next turn stay."""
    event_delay: float = 0.01
    """Seconds from the end of a step to the gateway that has applied its events."""
    gossip_delay: float = 0.005
    """Seconds until what a gateway has sent is counted by the others."""
    event_loss: float = 0.0
    """Share of event batches that gateways do not get live, and must ask for."""
    replay_delay: float = 0.1
    """Seconds until an engine has answered what it is asked for."""
    scrape_interval: float = 1.0
    """Seconds between two readings of an engine's metrics."""
    faults: Sequence[Fault] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The fleet at one moment."""

    at: float
    requests: Sequence[int]
    """Requests at each pod."""
    usage: Sequence[float]
    """Share of each pod's cache that running requests use."""


class Pod:
    """One replica: its engine, and where its events come from."""

    def __init__(self, name: str, engine: Engine, publisher: Publisher | None) -> None:
        self.name = name
        self.engine = engine
        self.publisher = publisher
        self.is_up = True
        self.is_listed = True
        self.scheduled = math.inf
        """When the loop will look at it."""
        self.resets = False
        """A reset waits until it is idle."""
        self.preemptions = 0
        self.busy_seconds = 0.0
        """Of earlier runs of the engine, as `preemptions`."""
