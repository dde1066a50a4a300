"""Which endpoints get no requests for a while, because of how they answered those they got. Pure.

Health checks ask the engine's HTTP server; an engine whose GPU has failed still passes them. So the answers to requests
count as well, as in Envoy's outlier detection: an endpoint that fails several times in a row, or too large a share of
its last requests, is ejected. Ejections grow longer each time, up to a bound, and shorter again after good behaviour.
After one, a single request is let through as a probe: its outcome readmits the endpoint or ejects it again. Where that
takes long, another probe follows after the time of the ejection. Where no request is sent there for that long, because
others suit all of them better, the endpoint is readmitted: it failed, but not lately.

    admitted ──failures──> ejected ──time──> half_open ──probe succeeds, no probe──> admitted
                              ^──────probe fails──────┘

A server error or a broken connection may be the fault of the request, and a client that repeats such a request must not
eject the fleet. So these failures are in doubt: they count, but no number of them ejects an endpoint until a request
that failed there has been answered by another endpoint. If it fails there as well, all that is in doubt is void at both.

    doubted ──enough──> checked, by another endpoint ──answers──> blamed: ejected
                                                     └──fails───> voided

An endpoint that answers that it is busy (429, 503) is not broken: it is left alone for as long as it asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from matrixinfer.config import OutliersConfig
from matrixinfer.pods.outcomes import Outcomes

State: TypeAlias = Literal["admitted", "checked", "busy", "ejected", "half_open"]

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
    outcomes: Outcomes = field(default_factory=Outcomes)
    checked_until: float = 0.0
    """Until when the answer of another endpoint is awaited."""
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
    """Judges every endpoint by its outcomes. `clock` gives seconds and never goes back.

    `can_check`: a request that failed may be sent to another endpoint. Otherwise nothing is in doubt.
    """

    def __init__(
        self,
        config: OutliersConfig,
        clock: Callable[[], float],
        watch: Watch | None = None,
        *,
        can_check: bool = True,
    ) -> None:
        self._config = config
        self._clock = clock
        self._watch = watch
        self._can_check = can_check
        self._endpoints: dict[str, _Endpoint] = {}
        """Endpoints with a failure or a busy answer in their recent past. All others are admitted."""
        self._reported: dict[str, dict[str, float]] = {}
        """By gateway that shares its ejections: what it ejected, and until when that report counts."""
        self._computed: dict[str, float] = {}
        """When each endpoint last began an answer."""

    def __len__(self) -> int:
        """Endpoints remembered."""
        return len(self._endpoints)

    def reconfigure(self, config: OutliersConfig) -> None:
        """Judge by these rules from now on; ejections that have begun last as long as they would have."""
        self._config = config

    def state(self, name: str) -> State:
        """What the endpoint may get now."""
        endpoint = self._known(name)
        if endpoint is None:
            return "admitted"
        now = self._clock()
        if endpoint.ejected_until is not None:
            return "ejected" if now < endpoint.ejected_until else "half_open"
        if now < endpoint.checked_until:
            return "checked"
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
            endpoint = self._known(name)
            if name in elsewhere and (endpoint is None or endpoint.ejected_until is None):
                ejected.append((elsewhere[name], name))
                continue
            if endpoint is None:
                continue
            if endpoint.ejected_until is not None and now < max(endpoint.ejected_until, endpoint.probing_until):
                ejected.append((endpoint.ejected_until, name))
            elif now < endpoint.checked_until:
                ejected.append((endpoint.checked_until, name))
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
        return [name for name in list(self._endpoints) if self._of(name).ejected_until is not None]

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
        endpoint = self._known(name)
        if endpoint is None:
            return
        if endpoint.ejected_until is not None:
            if probe:
                self._readmit(name, endpoint)
            return  # the request was sent before the ejection
        endpoint.busy = 0
        endpoint.outcomes.answered(self._clock())
        if self._is_forgotten(endpoint):
            del self._endpoints[name]

    def computed(self, name: str) -> None:
        """The endpoint has begun an answer: its engine works."""
        self._computed[name] = self._clock()

    def has_computed(self, name: str, since: float) -> bool:
        """Whether the endpoint has begun an answer since then, in seconds of `now`."""
        return self._computed.get(name, since) > since

    def now(self) -> float:
        """Seconds on this clock."""
        return self._clock()

    def failed(self, name: str, reason: str, *, probe: bool = False) -> None:
        """The endpoint failed a request, and the request cannot be to blame."""
        endpoint = self._of(name)
        if endpoint.ejected_until is not None:
            if probe:
                self._eject(name, endpoint, f"its probe failed: {reason}")
            return
        endpoint.outcomes.failed(self._clock(), in_doubt=False)
        self._eject_if_due(name, endpoint, reason)

    def doubted(self, name: str, reason: str, *, probe: bool = False) -> None:
        """The endpoint failed a request, which may itself be to blame: `blamed`, `voided` or `unchecked` follows."""
        if not self._can_check:
            self.failed(name, reason, probe=probe)
            return
        endpoint = self._of(name)
        if endpoint.ejected_until is None:
            endpoint.outcomes.failed(self._clock(), in_doubt=True)

    def is_due(self, name: str) -> bool:
        """Whether the endpoint has failed often enough to be ejected, but for the doubts."""
        endpoint = self._known(name)
        if endpoint is None or endpoint.ejected_until is not None:
            return False
        return endpoint.outcomes.due(self._config, self._clock()) is not None

    def checking(self, name: str) -> None:
        """Another endpoint has got the request in doubt. Until it answers, a due endpoint gets no requests."""
        if self._can_check and self.is_due(name):
            self._endpoints[name].checked_until = self._clock() + self._config.eject_seconds

    def blamed(self, name: str, reason: str, *, probe: bool = False) -> None:
        """Another endpoint has answered the request that failed here."""
        endpoint = self._known(name)
        if endpoint is None or not self._can_check:
            return
        endpoint.checked_until = 0.0
        if endpoint.ejected_until is not None:
            if probe:
                self._eject(name, endpoint, f"its probe failed: {reason}")
            return
        if endpoint.outcomes.doubts:
            endpoint.outcomes.doubts -= 1
            self._eject_if_due(name, endpoint, reason)

    def voided(self, name: str, *, probe: bool = False) -> None:
        """The request failed at another endpoint as well: nothing that is in doubt counts any longer."""
        endpoint = self._known(name)
        if endpoint is None or not self._can_check:
            return
        endpoint.checked_until = 0.0
        if endpoint.ejected_until is not None:
            if probe:
                self.abandoned(name)
            return
        endpoint.outcomes.void()

    def unchecked(self, name: str) -> None:
        """No other endpoint has said whose fault it was: the doubt remains."""
        endpoint = self._known(name)
        if endpoint is not None:
            endpoint.checked_until = 0.0

    def failures(self, name: str) -> int:
        """Requests that the endpoint failed since it last answered one, whoever was to blame."""
        endpoint = self._known(name)
        return 0 if endpoint is None else endpoint.outcomes.failures

    def busy(self, name: str, *, retry_after: float | None, probe: bool = False) -> None:
        """The endpoint answered that it has too much to do, and perhaps for how many seconds it wants to be left alone."""
        endpoint = self._of(name)
        if probe:
            self._readmit(name, endpoint)
            endpoint = self._endpoints.setdefault(name, endpoint)
        endpoint.outcomes.streak = endpoint.outcomes.doubts = 0
        seconds = self._config.busy_seconds * 2 ** min(endpoint.busy, _LONGEST_DOUBLING)
        endpoint.busy += 1
        wanted = seconds if retry_after is None else retry_after
        endpoint.busy_until = self._clock() + min(max(wanted, 0.0), self._config.max_busy_seconds)

    def not_busy(self, name: str) -> None:
        """The last `busy` was not about the endpoint."""
        endpoint = self._known(name)
        if endpoint is not None:
            endpoint.busy, endpoint.busy_until = max(0, endpoint.busy - 1), 0.0

    def abandoned(self, name: str) -> None:
        """The probe ended without an outcome, such as when its client went away."""
        endpoint = self._known(name)
        if endpoint is not None:
            endpoint.probing_until = 0.0

    def forget(self, name: str) -> None:
        """The endpoint has gone, or another engine has taken its place."""
        self._endpoints.pop(name, None)
        self._computed.pop(name, None)

    def reason(self, name: str) -> str | None:
        """Why the endpoint gets no requests, or only a probe, in words; None if it is admitted."""
        if self.state(name) == "admitted" and name not in self._elsewhere(self._clock()):
            return None
        return self._words(name, self._clock())

    def _words(self, name: str, now: float) -> str:
        endpoint = self._known(name)
        if endpoint is None or (
            endpoint.ejected_until is None and now >= max(endpoint.busy_until, endpoint.checked_until)
        ):
            return "ejected by another gateway"
        if endpoint.ejected_until is None and now < endpoint.checked_until:
            return "failed too often: another endpoint has got the last request, which may be to blame"
        if endpoint.ejected_until is None:
            return f"busy, for {endpoint.busy_until - now:.1f} s more"
        if now < endpoint.ejected_until:
            return f"ejected for {endpoint.ejected_until - now:.1f} s more ({endpoint.reason})"
        return (
            f"half open: {'waiting for its probe' if now < endpoint.probing_until else 'the next request is its probe'}"
        )

    def _known(self, name: str) -> _Endpoint | None:
        """What is remembered of an endpoint, which is readmitted if nobody has probed it in time."""
        endpoint = self._endpoints.get(name)
        if endpoint is not None and endpoint.ejected_until is not None:
            unprobed = max(endpoint.ejected_until, endpoint.probing_until) + endpoint.length
            if self._clock() >= unprobed:
                self._readmit(name, endpoint)
        return endpoint

    def _of(self, name: str) -> _Endpoint:
        return self._known(name) or self._endpoints.setdefault(name, _Endpoint())

    def _eject_if_due(self, name: str, endpoint: _Endpoint, reason: str) -> None:
        due = endpoint.outcomes.due(self._config, self._clock())
        if due is not None:
            self._eject(name, endpoint, f"{due}, the last: {reason}")

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
        endpoint.reason, endpoint.probing_until, endpoint.checked_until = reason, 0.0, 0.0
        endpoint.outcomes.forgive()
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
        return not endpoint.outcomes.has_failed_since(now - self._config.window_seconds)
