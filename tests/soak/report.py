"""What a soak measured, and whether that passes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from matrixinfer.config import RedisConfig
from tests.soak.clients import Tally

ANSWERED_SHARE = 0.95
"""Half of the pods may fail at a time, and what breaks in the middle of an answer cannot be repeated."""
MORE_DESCRIPTORS = 10
"""Kept connections to engines come and go."""
MORE_TASKS = 2
MORE_MEMORY, MORE_MEMORY_BYTES = 0.05, 8_000_000
"""Of the resident memory: allocators give back what they like."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One gateway at rest: all clients have gone, all pods are well."""

    memory_bytes: int
    descriptors: int
    tasks: int
    in_flight: int


@dataclass(kw_only=True)
class Result:
    """A whole soak."""

    seconds: float
    clients: int
    index: str
    least_answered: float = ANSWERED_SHARE
    rounds: list[list[Sample]] = field(default_factory=list)
    """After each round, by gateway. The first one is where the others must be back."""
    longest_pauses: list[dict[str, float]] = field(default_factory=list)
    """Seconds of the event loop, by gateway: `elapsed`, and `cpu` as far as it computed."""
    health_seconds: float = 0.0
    """The longest time that `/health` took."""
    faults: dict[str, int] = field(default_factory=dict)
    dead: list[int] = field(default_factory=list)
    """Gateways that have ended."""
    logged: dict[str, int] = field(default_factory=dict)
    """Events in the gateways' logs that are faults of the gateway."""

    @property
    def more_descriptors(self) -> int:
        """How many descriptors more than at first are no leak: a pool of connections to Redis keeps what it once needed."""
        return MORE_DESCRIPTORS + (RedisConfig().connections if self.index == "redis" else 0)

    def complaints(self, tally: Tally) -> Iterator[str]:
        """Why this does not pass."""
        yield from tally.wrong[:10]
        if tally.answered_share < self.least_answered:
            yield f"{tally.answered_share:.1%} of the requests were answered, expected {self.least_answered:.0%}"
        for number in self.dead:
            yield f"gateway {number} has ended"
        for event, times in self.logged.items():
            yield f"the log has {times} × {event}"
        for number in range(len(self.longest_pauses)):
            yield from self._leaks(number)

    def _leaks(self, gateway: int) -> Iterator[str]:
        samples = [samples[gateway] for samples in self.rounds]
        if len(samples) < 2:
            yield "no round ended"
            return
        first, last = samples[0], samples[-1]
        for what, before, after, more in (
            ("descriptors", first.descriptors, last.descriptors, self.more_descriptors),
            ("tasks", first.tasks, last.tasks, MORE_TASKS),
            ("requests in flight", 0, last.in_flight, 0),
        ):
            if after > before + more:
                yield f"gateway {gateway} has {after} {what}, expected {before} and at most {more} more"
        middle, end = growth(samples)
        if end > middle * (1 + MORE_MEMORY) + MORE_MEMORY_BYTES:
            yield f"the memory of gateway {gateway} grew from {middle / 1e6:.0f} to {end / 1e6:.0f} MB"

    def as_data(self, tally: Tally) -> Mapping[str, object]:
        """For JSON."""
        complaints = list(self.complaints(tally))
        behaviours: dict[str, dict[str, int]] = {name: {} for name, _ in sorted(tally.outcomes)}
        for (name, outcome), number in tally.outcomes.items():
            behaviours[name][outcome] = number
        requests = {outcome: tally.total(outcome) for outcome in ("answered", "failed", "left")}
        return {
            **{key: value for key, value in asdict(self).items() if key != "rounds"},
            "passed": not complaints,
            "complaints": complaints,
            "requests": {"sent": tally.sent, **requests, "answered_share": tally.answered_share},
            "behaviours": behaviours,
            "failures": dict(tally.failures),
            "rounds": [[asdict(sample) for sample in samples] for samples in self.rounds],
        }


def growth(samples: Sequence[Sample]) -> tuple[float, float]:
    """Memory in the middle and at the end: medians over a third of the rounds, as one sample says little.

    The first rounds do not count: caches fill.
    """
    memory = [sample.memory_bytes for sample in samples]
    third = max(1, len(memory) // 3)
    return statistics.median(memory[-2 * third : -third]), statistics.median(memory[-third:])


def show(result: Result, tally: Tally) -> Iterator[str]:
    """The lines of the tables."""
    yield f"{'behaviour':<26}{'answered':>10}{'failed':>8}{'left':>8}"
    for name in dict.fromkeys(name for name, _ in sorted(tally.outcomes)):
        numbers = [tally.outcomes[name, outcome] for outcome in ("answered", "failed", "left")]
        yield f"{name:<26}{numbers[0]:>10,}{numbers[1]:>8,}{numbers[2]:>8,}"
    yield f"{'all':<26}{tally.total('answered'):>10,}{tally.total('failed'):>8,}{tally.total('left'):>8,}"
    yield f"answered: {tally.answered_share:.2%} of the requests whose client waited"
    yield "failures: " + ", ".join(f"{times:,} × {kind}" for kind, times in tally.failures.most_common())
    yield "faults: " + ", ".join(f"{times} × {fault}" for fault, times in sorted(result.faults.items()))
    for gateway, pause in enumerate(result.longest_pauses):
        yield ""
        yield f"gateway {gateway} at rest"
        yield f"{'after round':<14}{'memory, MB':>12}{'descriptors':>13}{'tasks':>8}{'in flight':>11}"
        for number, samples in enumerate(result.rounds):
            it = samples[gateway]
            yield (f"{number:<14}{it.memory_bytes / 1e6:>12.1f}{it.descriptors:>13}{it.tasks:>8}{it.in_flight:>11}")
        yield (
            f"longest pause of the event loop: {1000 * pause['elapsed']:.0f} ms; "
            f"longest that it computed in one: {1000 * pause['cpu']:.0f} ms"
        )
    yield f"slowest answer of /health: {1000 * result.health_seconds:.0f} ms"
