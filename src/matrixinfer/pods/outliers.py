"""Which endpoints get no requests for a while, because of how they answered those they got. Pure.

Health checks ask the engine's HTTP server; an engine whose GPU has failed still passes them. So the answers to requests
count as well, as in Envoy's outlier detection: an endpoint that fails several times in a row, or too large a share of
its last requests, is ejected. Ejections grow longer each time, up to a bound, and shorter again after good behaviour.
After one, a single request is let through as a probe: its outcome readmits the endpoint or ejects it again. Where that
takes long, another probe follows after the time of the ejection.

    admitted ──failures──> ejected ──time──> half_open ──probe succeeds──> admitted
                              ^──────probe fails──────┘

An endpoint that answers that it is busy (429, 503) is not broken: it is left alone for as long as it asks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from matrixinfer.config import OutliersConfig

State: TypeAlias = Literal["admitted", "busy", "ejected", "half_open"]

_MAX_OUTCOMES = 256
"""The failure share is taken over at most this many of an endpoint's last requests."""
_LONGEST_DOUBLING = 16


class Watch(Protocol):
    """Sees endpoints go and come back."""

    def ejected(self, name: str, reason: str, seconds: float) -> None:
        """The endpoint gets no requests for `seconds`."""
        ...

    def readmitted(self, name: str) -> None:
        """The endpoint has answered its probe."""
        ...


@dataclass(slots=True)
class _Endpoint:
    streak: int = 0
    """Failures in a row."""
    outcomes: deque[tuple[float, bool]] = field(default_factory=lambda: deque(maxlen=_MAX_OUTCOMES))
    """When each of the last requests ended, and whether it failed."""
    ejections: int = 0
    """How often it was ejected lately; the next ejection lasts twice as long for each."""
    length: float = 0.0
    """Seconds that the last ejection lasted."""
    ejected_until: float | None = None
    """None unless it is ejected or half open."""
    readmitted_at: float = 0.0
    reason: str = ""
    probing_until: float = 0.0
    """When another probe may follow the last one: that may be a request whose answer takes minutes."""
    busy_until: float = 0.0
    busy: int = 0
    """Busy answers in a row."""


class Outliers:
    """Judges every endpoint by its outcomes. `clock` gives seconds and never goes back."""

    def __init__(self, config: OutliersConfig, clock: Callable[[], float], watch: Watch | None = None) -> None:
        self._config = config
        self._clock = clock
        self._watch = watch
        self._endpoints: dict[str, _Endpoint] = {}
        """Endpoints with a failure or a busy answer in their recent past. All others are admitted."""
        self._reported: dict[str, dict[str, float]] = {}
        """By gateway that shares its ejections: what it ejected, and until when that report counts."""

    def __len__(self) -> int:
        """Endpoints remembered."""
        return len(self._endpoints)

    def reconfigure(self, config: OutliersConfig) -> None:
        """Judge by these rules from now on; ejections that have begun last as long as they would have."""
        self._config = config

    def state(self, name: str) -> State:
        """What the endpoint may get now."""
        endpoint = self._endpoints.get(name)
        if endpoint is None:
            return "admitted"
        now = self._clock()
        if endpoint.ejected_until is not None:
            return "ejected" if now < endpoint.ejected_until else "half_open"
        return "busy" if now < endpoint.busy_until else "admitted"

    def withheld(self, names: Iterable[str]) -> Mapping[str, str]:
        """Those of `names`, the endpoints that could take a request, which must not get it, with the reason in words.

        At least one is left, and of the ejected ones at most the configured share is withheld: those with the longest
        time to go.
        """
        if not (self._endpoints or self._reported):
            return {}
        names = list(names)
        now = self._clock()
        elsewhere = self._elsewhere(now)
        ejected: list[tuple[float, str]] = []
        busy: list[tuple[float, str]] = []
        for name in names:
            endpoint = self._endpoints.get(name)
            if name in elsewhere and (endpoint is None or endpoint.ejected_until is None):
                ejected.append((elsewhere[name], name))
                continue
            if endpoint is None:
                continue
            if endpoint.ejected_until is not None and now < max(endpoint.ejected_until, endpoint.probing_until):
                ejected.append((endpoint.ejected_until, name))
            elif now < endpoint.busy_until:
                busy.append((endpoint.busy_until, name))
        most = min(-int(-self._config.max_ejected_share * len(names) // 1), len(names) - 1)
        kept = sorted(ejected, reverse=True)[: max(0, most)]
        held = {name: self._words(name, now) for _, name in kept}
        for _, name in sorted(busy, reverse=True)[: max(0, len(names) - 1 - len(held))]:
            held[name] = self._words(name, now)
        return held

    def ejected(self) -> list[str]:
        """The endpoints that this gateway has ejected and not readmitted."""
        return [name for name, endpoint in self._endpoints.items() if endpoint.ejected_until is not None]

    def reported(self, gateway: str, names: Iterable[str], *, seconds: float) -> None:
        """Another gateway has ejected these endpoints. That counts for `seconds`, within which it reports again.

        It probes them itself: here they are left alone until it no longer names them.
        """
        until = self._clock() + seconds
        self._reported.pop(gateway, None)
        if ejected := dict.fromkeys(names, until):
            self._reported[gateway] = ejected

    def _elsewhere(self, now: float) -> dict[str, float]:
        """What others have ejected, and until when that counts."""
        if not self._reported:
            return {}
        self._reported = {
            gateway: each for gateway, each in self._reported.items() if any(now < until for until in each.values())
        }
        return {name: until for each in self._reported.values() for name, until in each.items() if now < until}

    def started(self, name: str) -> bool:
        """A request goes to the endpoint. Returns True if it is the probe of a half-open one."""
        if name not in self._endpoints or self.state(name) != "half_open":
            return False
        endpoint, now = self._endpoints[name], self._clock()
        if now < endpoint.probing_until:
            return False
        endpoint.probing_until = now + endpoint.length
        return True

    def succeeded(self, name: str, *, probe: bool = False) -> None:
        """The endpoint answered a request, if only with an error that was the client's fault."""
        endpoint = self._endpoints.get(name)
        if endpoint is None:
            return
        if endpoint.ejected_until is not None:
            if probe:
                self._readmit(name, endpoint)
            return  # the request was sent before the ejection
        endpoint.streak = endpoint.busy = 0
        endpoint.outcomes.append((self._clock(), False))
        if self._is_forgotten(endpoint):
            del self._endpoints[name]

    def failed(self, name: str, reason: str, *, probe: bool = False) -> None:
        """The endpoint answered with a server error or not properly, or broke the connection, or was silent for too long."""
        endpoint = self._endpoints.setdefault(name, _Endpoint())
        now = self._clock()
        if endpoint.ejected_until is not None:
            if probe:
                self._eject(name, endpoint, f"its probe failed: {reason}")
            return
        endpoint.streak += 1
        endpoint.outcomes.append((now, True))
        if endpoint.streak >= self._config.consecutive_failures:
            self._eject(name, endpoint, f"{endpoint.streak} failures in a row, the last: {reason}")
            return
        recent = [is_failure for at, is_failure in endpoint.outcomes if now - at <= self._config.window_seconds]
        if len(recent) >= self._config.min_requests and sum(recent) >= self._config.failure_share * len(recent):
            self._eject(name, endpoint, f"{sum(recent)} of its last {len(recent)} requests failed, the last: {reason}")

    def busy(self, name: str, *, retry_after: float | None, probe: bool = False) -> None:
        """The endpoint answered that it has too much to do, and perhaps for how many seconds it wants to be left alone."""
        endpoint = self._endpoints.setdefault(name, _Endpoint())
        if probe:
            self._readmit(name, endpoint)
            endpoint = self._endpoints.setdefault(name, endpoint)
        endpoint.streak = 0
        seconds = self._config.busy_seconds * 2 ** min(endpoint.busy, _LONGEST_DOUBLING)
        endpoint.busy += 1
        wanted = seconds if retry_after is None else retry_after
        endpoint.busy_until = self._clock() + min(max(wanted, 0.0), self._config.max_busy_seconds)

    def abandoned(self, name: str) -> None:
        """The probe ended without an outcome, such as when its client went away."""
        endpoint = self._endpoints.get(name)
        if endpoint is not None:
            endpoint.probing_until = 0.0

    def forget(self, name: str) -> None:
        """The endpoint has gone, or another engine has taken its place."""
        self._endpoints.pop(name, None)

    def reason(self, name: str) -> str | None:
        """Why the endpoint gets no requests, or only a probe, in words; None if it is admitted."""
        if self.state(name) == "admitted" and name not in self._elsewhere(self._clock()):
            return None
        return self._words(name, self._clock())

    def _words(self, name: str, now: float) -> str:
        endpoint = self._endpoints.get(name)
        if endpoint is None or (endpoint.ejected_until is None and now >= endpoint.busy_until):
            return "ejected by another gateway"
        if endpoint.ejected_until is None:
            return f"busy, for {endpoint.busy_until - now:.1f} s more"
        if now < endpoint.ejected_until:
            return f"ejected for {endpoint.ejected_until - now:.1f} s more ({endpoint.reason})"
        return (
            f"half open: {'waiting for its probe' if now < endpoint.probing_until else 'the next request is its probe'}"
        )

    def _eject(self, name: str, endpoint: _Endpoint, reason: str) -> None:
        now, config = self._clock(), self._config
        if endpoint.ejected_until is None and endpoint.length:
            # Every stretch of good behaviour as long as the last ejection makes the next one shorter by half.
            good = int((now - endpoint.readmitted_at) / endpoint.length)
            endpoint.ejections = max(0, endpoint.ejections - good)
        endpoint.length = min(
            config.eject_seconds * 2 ** min(endpoint.ejections, _LONGEST_DOUBLING), config.max_eject_seconds
        )
        endpoint.ejections += 1
        endpoint.ejected_until = now + endpoint.length
        endpoint.reason, endpoint.probing_until, endpoint.streak = reason, 0.0, 0
        endpoint.outcomes.clear()
        if self._watch is not None:
            self._watch.ejected(name, reason, endpoint.length)

    def _readmit(self, name: str, endpoint: _Endpoint) -> None:
        endpoint.ejected_until, endpoint.probing_until = None, 0.0
        endpoint.readmitted_at = self._clock()
        if self._watch is not None:
            self._watch.readmitted(name)

    def _is_forgotten(self, endpoint: _Endpoint) -> bool:
        """Whether nothing of its past matters any longer."""
        now = self._clock()
        if now < endpoint.busy_until or now - endpoint.readmitted_at <= endpoint.length * endpoint.ejections:
            return False
        return not any(failed and now - at <= self._config.window_seconds for at, failed in endpoint.outcomes)
