"""One row per endpoint: who is there, how well, how much it is believed, and what it has to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeAlias

import msgspec

from matrixinfer.dashboard.history import History
from matrixinfer.pods.outliers import Outliers
from matrixinfer.pods.pod import Drain
from matrixinfer.pods.registry import Endpoint, Pod, PodRegistry
from matrixinfer.pods.slow_start import shares
from matrixinfer.scheduler.framework import Trust
from matrixinfer.traffic.load import LoadLedger
from matrixinfer.trust.cache_views import Caches

State: TypeAlias = Literal["up", "slow_start", "busy", "probing", "asleep", "draining", "ejected", "down"]
_SHARE_STEPS = 20
"""Shares are shown in steps of a twentieth, as each change of a row is sent to every page."""


class EndpointRow(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint as known now. None means unknown."""

    name: str
    pod: str
    rank: int | None
    url: str
    model: str | None
    engine: str | None
    version: str | None
    restarts: int
    state: State
    state_reason: str | None
    share: float | None
    """In `slow_start`: what it gets at most of what others have in flight on average, 0 to 1."""
    leaves_in_s: int | None
    """While it is `draining`: seconds until it leaves at the latest."""
    trust: Trust
    feed: str | None
    limits: Sequence[str]
    """Why its events are not believed exactly."""
    in_flight: int
    running: int | None
    waiting: int | None
    queued_tokens: int
    queue_ms: float
    cache_usage: float | None
    """Share of its cache that requests use now, 0 to 1."""
    held_tokens: int | None
    """Tokens that its cache holds, in use or not."""
    cache_tokens: int | None
    engine_block: int | None
    reuse: float
    requests: int
    """In the last hour, as are the following."""
    hit_rate: float | None
    prompt_tokens: int
    cached_tokens: int


class Fleet:
    """Reads the rows of all endpoints from the parts that know them."""

    def __init__(
        self,
        registry: PodRegistry,
        caches: Caches,
        outliers: Outliers,
        load: LoadLedger,
        history: History,
        reuse: Callable[[str], float] = lambda _: 1.0,
        slow_start_seconds: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._slow_start_seconds = slow_start_seconds
        self._registry = registry
        self._caches = caches
        self._outliers = outliers
        self._load = load
        self._history = history
        self._reuse = reuse

    def rows(self) -> Iterator[EndpointRow]:
        """Every endpoint, in the order of the pods."""
        now = self._registry.clock()
        new = self._slow_starts(now)
        for pod in self._registry.pods:
            for endpoint in pod.endpoints:
                yield self._row(endpoint, now, new.get(endpoint.name))

    def _slow_starts(self, now: float) -> dict[str, float]:
        """The shares of endpoints that came up lately, beside others of their model."""
        seconds = self._slow_start_seconds()
        if now - self._registry.newest_up >= seconds:
            return {}
        by_model: dict[str | None, list[Endpoint]] = {}
        for pod in self._registry.pods:
            if pod.healthy and pod.drain is None:
                by_model.setdefault(pod.base_model, []).extend(pod.endpoints)
        found: dict[str, float] = {}
        for endpoints in by_model.values():
            withheld = self._outliers.withheld(each.name for each in endpoints)
            found |= shares(endpoints, now=now, seconds=seconds, withheld=withheld)
        return found

    def _row(self, endpoint: Endpoint, now: float, share: float | None) -> EndpointRow:
        pod, name = endpoint.pod, endpoint.name
        cache = self._caches.of(name)
        metrics = self._registry.metrics_of(pod, now)
        shown = self._registry.load_of(endpoint, now)
        engine = shown or (metrics if metrics is None or endpoint.rank is None else metrics.ranks.get(endpoint.rank))
        footprint = None if cache is None else cache.footprint
        cache_tokens = None if metrics is None else metrics.cache_tokens
        load, hour = self._load.view(name, now), self._history.endpoint(name)
        state, words = self._state(endpoint, now, share)
        engine_block = None if cache is None else cache.engine_block
        if engine_block is None and metrics is not None:
            engine_block = metrics.block_size
        return EndpointRow(
            name=name,
            pod=pod.name,
            rank=endpoint.rank,
            url=pod.url,
            model=pod.base_model,
            engine=pod.engine,
            version=pod.version,
            restarts=pod.restarts,
            state=state,
            state_reason=words,
            share=_stepped(share) if state == "slow_start" and share is not None else None,
            leaves_in_s=None if pod.drain is None else max(0, round(pod.drain.ends - now)),
            trust="none" if cache is None else cache.trust,
            feed=None if cache is None else cache.feed,
            limits=tuple(self._caches.limits_of(name)),
            in_flight=load.in_flight,
            running=None if engine is None else engine.running,
            waiting=None if engine is None else engine.waiting,
            queued_tokens=load.queued_tokens,
            queue_ms=round(load.queue_seconds * 1e3),
            cache_usage=None if engine is None or engine.cache_usage is None else round(engine.cache_usage, 3),
            held_tokens=None if footprint is None else footprint.held_tokens,
            cache_tokens=cache_tokens if footprint is None else footprint.capacity(cache_tokens),
            engine_block=engine_block,
            reuse=round(self._reuse(name), 3),
            requests=hour.requests,
            hit_rate=round(hour.cached_tokens / hour.prompt_tokens, 4) if hour.prompt_tokens else None,
            prompt_tokens=hour.prompt_tokens,
            cached_tokens=hour.cached_tokens,
        )

    def _state(self, endpoint: Endpoint, now: float, share: float | None) -> tuple[State, str | None]:
        """What it may get, and why not everything."""
        pod, outlier = endpoint.pod, self._outliers.state(endpoint.name)
        if pod.drain is not None:
            return "draining", _drained(pod, pod.drain, now)
        if not pod.healthy:
            return "down", _silence(pod)
        if outlier == "ejected":
            return "ejected", self._outliers.reason(endpoint.name)
        if pod.asleep is not None:
            return "asleep", f"sleeps: {pod.asleep.replace('_', ' ')}"
        if outlier == "half_open":
            return "probing", self._outliers.reason(endpoint.name)
        if outlier == "busy":
            return "busy", self._outliers.reason(endpoint.name)
        if share is not None:
            return "slow_start", f"came up lately: gets at most {_stepped(share):.0%} of what others have in flight"
        return "up", None


def _stepped(share: float) -> float:
    return round(share * _SHARE_STEPS) / _SHARE_STEPS


def _drained(pod: Pod, drain: Drain, now: float) -> str:
    words = f"gets no more requests since {now - drain.began:.0f} s, leaves in {max(0.0, drain.ends - now):.0f} s at the latest"
    return words if pod.healthy else f"{words}; {_silence(pod)}"


def _silence(pod: Pod) -> str:
    if not pod.failures:
        return "has not answered yet"
    return f"has not answered {pod.failures} times in a row" if pod.failures > 1 else "did not answer"
