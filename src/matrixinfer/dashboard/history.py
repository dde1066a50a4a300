"""The last hour of traffic, counted as requests pass. Pure: a clock is handed in, and memory is bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import msgspec

from matrixinfer.dashboard.round_robin import RoundRobin
from matrixinfer.dashboard.sums import EndpointSums, Sums
from matrixinfer.routing.decision_log import Record
from matrixinfer.scheduler.framework import Decision

BUCKET_SECONDS = 15
BUCKETS = 240
"""An hour."""
_NAMES = 64
"""Models that are counted by name within a bucket; the requests of others are counted together."""
OTHERS = "(others)"


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """What one bucket, or the whole hour, has counted. None where nothing was counted."""

    number: int
    """Which bucket: numbers count up, one every `BUCKET_SECONDS`. -1 for the whole hour."""
    ago_s: float
    """Seconds since it began."""
    requests: int
    errors: int
    predicted_of: int
    predicted_tokens: int
    reported_of: int
    reported_tokens: int
    silent_tokens: int
    saved_seconds: float
    round_robin_of: int
    round_robin_tokens: int
    ttft_p50_ms: float | None
    ttft_p90_ms: float | None


class History:
    """Counts decisions and their outcomes in buckets of `BUCKET_SECONDS`; those older than an hour are dropped."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.began = clock()
        """When the counting began."""
        self.hour = Sums()
        self.buckets: deque[tuple[int, Sums]] = deque()
        self._round_robin = RoundRobin()
        self._reporting: set[str] = set()
        """Endpoints whose answers have reported cached tokens: one without a number has found none."""

    def decided(self, record: Record, decision: Decision) -> None:
        """A request goes to its pod."""
        hit = self._round_robin.hit(decision)
        if hit is not None:
            tokens = decision.request.prompt_tokens or 0
            for sums in (self._now(), self.hour):
                sums.round_robin_of += tokens
                sums.round_robin_tokens += hit

    def ended(self, record: Record) -> None:
        """An answer is over."""
        endpoint = record.attempts[-1]
        cached = record.cached
        if cached is not None:
            self._reporting.add(endpoint)
        elif endpoint in self._reporting and record.counted is not None:
            cached = 0
        for sums in (self._now(), self.hour):
            self._count(sums, record, endpoint, cached)

    def forget(self, endpoint: str) -> None:
        """An endpoint has gone. What it has done in the hour stays in the sums over all, not as a part of its own."""
        self._reporting.discard(endpoint)
        for sums in (self.hour, *(each for _, each in self.buckets)):
            sums.endpoints.pop(endpoint, None)
        self._round_robin.forget(endpoint)

    def __len__(self) -> int:
        """Prefixes that are remembered to estimate what round robin would have found."""
        return len(self._round_robin)

    def total(self) -> Point:
        """The whole hour."""
        self._now()
        return self._point(-1, self.hour, min(self._clock() - self.began, BUCKETS * BUCKET_SECONDS))

    def points(self, since: int = 0) -> list[Point]:
        """The buckets from number `since` on, in ascending order. A stretch without requests has none."""
        self._now()
        now = self._clock()
        return [
            self._point(number, sums, now - number * BUCKET_SECONDS) for number, sums in self.buckets if number >= since
        ]

    @property
    def number(self) -> int:
        """The number of the current bucket."""
        return int(self._clock() // BUCKET_SECONDS)

    def endpoint(self, name: str) -> EndpointSums:
        """What an endpoint has done in the hour."""
        return self.hour.endpoints.get(name) or EndpointSums()

    def _now(self) -> Sums:
        """The current bucket."""
        number = self.number
        if self.buckets and self.buckets[-1][0] == number:
            return self.buckets[-1][1]
        while self.buckets and self.buckets[0][0] <= number - BUCKETS:
            self.hour.add(self.buckets.popleft()[1], -1)
        if not self.buckets:
            self.hour = Sums()  # sums of fractions do not come back to 0 by themselves
        self.buckets.append((number, Sums()))
        return self.buckets[-1][1]

    @staticmethod
    def _count(sums: Sums, record: Record, endpoint: str, cached: int | None) -> None:
        sums.requests += 1
        sums.errors += record.status is None or record.status >= 500
        part = sums.endpoint(endpoint)
        part.requests += 1
        model = record.model if record.model in sums.models or len(sums.models) < _NAMES else OTHERS
        sums.models[model] = sums.models.get(model, 0) + 1
        if record.ttft_ms is not None:
            sums.first_byte(record.ttft_ms)
        if record.counted is not None and cached is not None:
            sums.reported_of += record.counted
            sums.reported_tokens += cached
            part.prompt_tokens += record.counted
            part.cached_tokens += cached
            rate = _prefill_rate(record, endpoint)
            if rate:
                sums.saved_seconds += cached / rate
        elif record.counted is not None:
            sums.silent_tokens += record.counted
        if record.prompt_tokens and len(record.attempts) == 1:  # nothing was predicted for another pod
            sums.predicted_of += record.prompt_tokens
            sums.predicted_tokens += record.kept[0].predicted_hit(record.prompt_tokens, record.block_size)

    def _point(self, number: int, sums: Sums, ago: float) -> Point:
        return Point(
            number=number,
            ago_s=round(ago, 1),
            requests=sums.requests,
            errors=sums.errors,
            predicted_of=sums.predicted_of,
            predicted_tokens=sums.predicted_tokens,
            reported_of=sums.reported_of,
            reported_tokens=sums.reported_tokens,
            silent_tokens=sums.silent_tokens,
            saved_seconds=round(sums.saved_seconds, 2),
            round_robin_of=sums.round_robin_of,
            round_robin_tokens=sums.round_robin_tokens,
            ttft_p50_ms=_rounded(sums.percentile(0.5)),
            ttft_p90_ms=_rounded(sums.percentile(0.9)),
        )


def _prefill_rate(record: Record, endpoint: str) -> float | None:
    """Tokens per second that the endpoint computes, as known when it was chosen."""
    return next((each.condition.prefill_rate for each in record.kept if each.name == endpoint), None)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
