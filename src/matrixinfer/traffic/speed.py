"""How fast each pod computes prompts, learnt from how long answers took to begin. Pure.

A sample is the tokens that a pod had to compute until an answer began, over the time that took: it includes what the
pod's decoding costs. Samples are averaged as logarithms, and one sample counts for at most a factor, so that a stall or
a wrong count moves the estimate only a little. A pod without samples is taken to be like the fleet, and a pod that gets no
requests becomes like the fleet again, so that one that was slow once is tried again.
"""

from __future__ import annotations

from math import exp, log

USUAL_RATE = 8_000.0
"""Tokens per second, until the first sample of any pod."""
LEAST_RATE, MOST_RATE = 10.0, 1_000_000.0
LEAST_TOKENS = 256
"""With fewer tokens to compute, the time shows the pod's overhead."""
HALF_LIFE_SECONDS = 60.0
"""Without samples, the difference from the fleet halves in this time."""
NOISE = 0.2
"""Pods whose rates differ from the fleet's by less than this share are taken to be as fast: else the one that happened to
look a little faster would get every request that could go anywhere."""
_REFRESH_SECONDS = 1.0
_KNOWN_AFTER = 4
"""Samples after which one more counts for at most a factor of e."""
_PRIOR = 2
"""Samples that the fleet counts for in the estimate of a new pod."""
_MOST_OVERHEAD = 1.0


class _Average:
    """A robust average of logarithms."""

    __slots__ = ("least_weight", "samples", "value")

    def __init__(self, least_weight: float) -> None:
        self.value = log(USUAL_RATE)
        self.samples = 0
        self.least_weight = least_weight

    def add(self, sample: float) -> None:
        change = sample - self.value
        if self.samples >= _KNOWN_AFTER:
            change = min(1.0, max(-1.0, change))
        self.samples += 1
        self.value += change * max(self.least_weight, 1.0 / self.samples)


class Speeds:
    """The fleet: what a pod is taken for while little is known about it."""

    def __init__(self) -> None:
        self.average = _Average(0.02)

    def new(self) -> Speed:
        """The speed of a new pod."""
        return Speed(self.average)


class Speed:
    """The speed of one pod. Every `now` is in seconds and must not decrease."""

    __slots__ = ("_at", "_fleet", "_overhead", "_own", "_rate", "_stale_at")

    def __init__(self, fleet: _Average) -> None:
        self._fleet = fleet
        self._own: _Average | None = None
        self._at = 0.0
        self._overhead = 0.0
        self._rate = USUAL_RATE
        self._stale_at = float("-inf")

    @property
    def samples(self) -> int:
        """Samples of this pod."""
        return 0 if self._own is None else self._own.samples

    def rate(self, now: float) -> float:
        """Prompt tokens that the pod computes per second."""
        if now >= self._stale_at:
            fleet, own = self._fleet.value, self._log(now)
            beyond = max(0.0, abs(own - fleet) - NOISE)
            self._rate = exp(fleet + (beyond if own > fleet else -beyond))
            self._stale_at = now + _REFRESH_SECONDS
        return self._rate

    def observe(self, tokens: float, seconds: float, now: float, *, is_whole: bool = False) -> None:
        """An answer began after `seconds`, and the pod had to compute `tokens` for that.

        `is_whole` says that the answer came as a whole, after it was generated: then the pod is at least that fast.
        """
        if seconds <= 0.0:
            return
        if tokens < LEAST_TOKENS:
            if not is_whole:
                change = min(seconds, _MOST_OVERHEAD) - self._overhead
                self._overhead += change * (0.3 if change < 0.0 else 0.05)
            return
        computing = max(seconds - self._overhead, 0.25 * seconds)
        sample = min(MOST_RATE, max(LEAST_RATE, tokens / computing))
        if is_whole and sample <= self.rate(now):
            return
        if self._own is None:
            self._own = _Average(0.1)
            if self._fleet.samples >= _KNOWN_AFTER:
                self._own.value, self._own.samples = self._fleet.value, _PRIOR
        self._own.value = self._log(now)
        self._own.add(log(sample))
        self._fleet.add(log(sample))
        self._at, self._stale_at = now, float("-inf")

    def _log(self, now: float) -> float:
        if self._own is None:
            return self._fleet.value
        fading: float = 0.5 ** (max(0.0, now - self._at) / HALF_LIFE_SECONDS)
        return self._fleet.value + (self._own.value - self._fleet.value) * fading
