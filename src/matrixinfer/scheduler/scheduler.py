"""Runs a profile: the filters, the scorers, the picker, and then the plugins that want to see the decision.

A plugin may be anyone's code. If it raises, or returns what the contract forbids, the decision is made without it: a
note says so, `Scheduler.rejected` counts it, the watch sees it, and the request is still routed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from itertools import islice
from operator import index
from types import MappingProxyType
from typing import TypeVar

from msgspec.structs import replace

from matrixinfer.config import SchedulerConfig
from matrixinfer.errors import NoPodAvailable, PluginError
from matrixinfer.scheduler.framework import (
    Candidate,
    Decision,
    Filter,
    Picker,
    Plugin,
    PluginWatch,
    PostSchedule,
    SchedulingRequest,
    Scorer,
    Scores,
    Services,
)
from matrixinfer.scheduler.profile import build

T = TypeVar("T")
Pods = Sequence[Candidate]


class Scheduler:
    """Decides which pod gets a request. Synchronous, without I/O; one call at a time.

    `registry` maps names to plugin classes, and `broken` maps the names of plugins that cannot be used to the reason.
    Raises `ConfigError` if the profile in `config` does not fit them.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        services: Services,
        registry: Mapping[str, type[Plugin]],
        *,
        broken: Mapping[str, str] = MappingProxyType({}),
        watch: PluginWatch | None = None,
    ) -> None:
        self._services = services
        self._watch = watch or _Unwatched()
        self._slow_seconds = config.slow_plugin_seconds
        self._profile = build(config, services, registry, broken)
        self.rejected: dict[str, int] = dict.fromkeys(self._profile.plugins, 0)
        """How often each enabled plugin raised, or returned what the contract forbids."""
        self.slow: dict[str, int] = dict.fromkeys(self._profile.plugins, 0)
        """How many calls of each enabled plugin took longer than `slowPluginSeconds`."""

    @property
    def plugins(self) -> Mapping[str, Plugin]:
        """The enabled plugins by name."""
        return MappingProxyType(dict(self._profile.plugins))

    @property
    def reads_bytes(self) -> bool:
        """Whether a plugin needs the prompt's chunks also when all token ids are known."""
        return self._profile.reads_bytes

    def schedule(
        self, request: SchedulingRequest, candidates: Sequence[Candidate], *, dry_run: bool = False
    ) -> Decision:
        """Rank `candidates` for `request`. A dry run changes nothing: no draw, no count, no plugin's state.

        Raises `NoPodAvailable` if there are no candidates.
        """
        if not candidates:
            raise NoPodAvailable(f"no pod serves the model `{request.model}` now")
        attempts = _Attempts(self._services.clock, self._watch, self._slow_seconds)
        if dry_run:
            state = self._services.rng.getstate()
            try:
                return self._decide(request, tuple(candidates), attempts)
            finally:
                self._services.rng.setstate(state)
        decision = self._decide(request, tuple(candidates), attempts)
        if self._profile.listeners:
            decision = self._post_schedule(request, decision, attempts)
        for name in attempts.failed:
            self.rejected[name] += 1
        for name in attempts.slow:
            self.slow[name] += 1
        return decision

    def _decide(self, request: SchedulingRequest, candidates: tuple[Candidate, ...], attempts: _Attempts) -> Decision:
        pods, filtered = self._filter(request, candidates, attempts)
        names = [pod.name for pod in pods]
        totals = [0.0] * len(pods)
        scores: dict[str, Mapping[str, float]] = {}
        expected_ms: Mapping[str, float] = {}
        left_out = self._profile.needs_session if request.session is None else ()
        for name, weight, scorer in self._profile.scorers:
            if name in left_out:
                continue
            answer = attempts.run("Score", name, _score, scorer, request, pods)
            if answer is None:
                continue
            scores[name] = dict(zip(names, answer.values, strict=True))
            totals = [total + weight * value for total, value in zip(totals, answer.values, strict=True)]
            if answer.expected_ms is not None:
                expected_ms = dict(zip(names, answer.expected_ms, strict=True))
            if answer.note is not None:
                attempts.notes.append(f"{name}: {answer.note}")
        name, picker = self._profile.picker
        order = attempts.run("Picker", name, _pick, picker, request, pods, totals)
        if order is None:
            order = sorted(range(len(pods)), key=totals.__getitem__, reverse=True)
        return Decision(
            request=request,
            candidates=candidates,
            ranked=tuple(pods[i] for i in order),
            filtered=filtered,
            scores=scores,
            totals=dict(zip(names, totals, strict=True)),
            timings_ms=attempts.timings_ms,
            notes=tuple(attempts.notes),
            expected_ms=expected_ms,
        )

    def _filter(
        self, request: SchedulingRequest, pods: tuple[Candidate, ...], attempts: _Attempts
    ) -> tuple[tuple[Candidate, ...], dict[str, str]]:
        filtered = {pod.name: pod.withheld for pod in pods if pod.withheld is not None}
        if filtered:
            kept = tuple(pod for pod in pods if pod.withheld is None)
            if kept:
                pods = kept
            else:
                attempts.notes.append("every endpoint is ejected or busy; they are used nevertheless")
                filtered = {}
        left_out = self._profile.needs_session if request.session is None else ()
        for name, plugin in self._profile.filters:
            if name in left_out:
                continue
            reasons = attempts.run("Filter", name, _filter, plugin, request, pods)
            if reasons is None or reasons.count(None) == len(pods):
                continue
            kept = tuple(pod for pod, reason in zip(pods, reasons, strict=True) if reason is None)
            if not kept:
                attempts.notes.append(f"{name}: ignored, as it would remove every remaining pod")
                continue
            for pod, reason in zip(pods, reasons, strict=True):
                if reason is not None:
                    filtered[pod.name] = f"{name}: {reason}"
            pods = kept
        return pods, filtered

    def _post_schedule(self, request: SchedulingRequest, decision: Decision, attempts: _Attempts) -> Decision:
        left_out = self._profile.needs_session if request.session is None else ()
        for name, listener in self._profile.listeners:
            if name in left_out:
                continue
            attempts.run("PostSchedule", name, _post_schedule, listener, request, decision)
        if len(attempts.notes) == len(decision.notes):
            return decision
        return replace(decision, notes=tuple(attempts.notes))


class _Unwatched:
    """A watch for schedulers whose plugins nobody watches."""

    def failed(self, plugin: str, stage: str, error: BaseException, reason: str) -> None: ...

    def slow(self, plugin: str, stage: str, seconds: float) -> None: ...


class _Attempts:
    """The calls of plugins in one decision: who failed, who was slow, what must be noted, how long each took."""

    __slots__ = ("_clock", "_slow_seconds", "_watch", "failed", "notes", "slow", "timings_ms")

    def __init__(self, clock: Callable[[], float], watch: PluginWatch, slow_seconds: float) -> None:
        self._clock = clock
        self._watch = watch
        self._slow_seconds = slow_seconds
        self.failed: list[str] = []
        self.slow: list[str] = []
        self.notes: list[str] = []
        self.timings_ms: dict[str, float] = {}

    def run(self, stage: str, name: str, call: Callable[..., T], *args: object) -> T | None:
        """Return the checked answer of the plugin `name`, or None if it failed."""
        start = self._clock()
        try:
            return call(*args)
        except KeyboardInterrupt:
            raise  # it comes from the user
        except BaseException as error:  # noqa: BLE001
            # Supervision boundary: no plugin may fail a request. `SystemExit` must not end the gateway; and as nothing
            # here is awaited, a `CancelledError` is the plugin's own, and must not look like a cancelled request.
            reason = _described(error)
            self.failed.append(name)
            self.notes.append(f"{name}: left out, as it {reason}")
            self._watch.failed(name, stage, error, reason)
            return None
        finally:
            seconds = self._clock() - start
            self.timings_ms[name] = self.timings_ms.get(name, 0.0) + seconds * 1e3
            if seconds > self._slow_seconds:
                self.slow.append(name)
                self._watch.slow(name, stage, seconds)


def _filter(plugin: Filter, request: SchedulingRequest, pods: Pods) -> list[str | None]:
    reasons = _one_each(plugin.filter(request, pods), pods, "reasons")
    if reasons.count(None) == len(pods):
        return reasons
    if not all(reason is None or isinstance(reason, str) for reason in reasons):
        raise PluginError("returned a reason that is neither text nor None")
    return [None if reason is None else f"{reason}" for reason in reasons]


def _score(plugin: Scorer, request: SchedulingRequest, pods: Pods) -> Scores:
    answer = plugin.score(request, pods)
    values = list(map(float, _one_each(answer.values, pods, "scores")))
    # `min` and `max` may overlook a NaN; a sum cannot.
    if not (min(values) >= 0.0 and max(values) <= 100.0 and math.isfinite(sum(values))):
        raise PluginError("returned a score that is not between 0 and 100")
    if not (answer.note is None or isinstance(answer.note, str)):
        raise PluginError("returned a note that is neither text nor None")
    expected = answer.expected_ms
    if expected is not None:
        expected = list(map(float, _one_each(expected, pods, "expected times")))
        if not math.isfinite(sum(expected)):
            raise PluginError("returned an expected time that is not finite")
    return Scores(values=values, note=None if answer.note is None else f"{answer.note}", expected_ms=expected)


def _pick(plugin: Picker, request: SchedulingRequest, pods: Pods, totals: Sequence[float]) -> list[int]:
    order = list(map(index, _one_each(plugin.pick(request, pods, tuple(totals)), pods, "positions")))
    if sorted(order) != list(range(len(pods))):
        raise PluginError("did not rank every pod exactly once")
    return order


def _post_schedule(plugin: PostSchedule, request: SchedulingRequest, decision: Decision) -> None:
    plugin.post_schedule(request, decision)


def _one_each(answer: Iterable[T], pods: Pods, what: str) -> list[T]:
    """The items of a plugin's answer, one per pod. An answer may be an iterator that never ends."""
    if type(answer) is list and len(answer) == len(pods):
        return [*answer]
    items = list(islice(answer, len(pods) + 1))
    if len(items) != len(pods):
        given = len(answer) if isinstance(answer, Sized) else len(items)
        raise PluginError(f"returned {given} {what} for {len(pods)} pods")
    return items


def _described(error: BaseException) -> str:
    """Describe a failure, whatever it is: even an attribute of a foreign error may raise."""
    try:
        return _reason(error)
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001  # Supervision boundary: see `_Attempts.run`.
        return "raised an error that cannot be read"


def _reason(error: BaseException) -> str:
    """Describe a failure. A foreign message may quote the prompt, so for foreign errors only type and place are named."""
    if isinstance(error, PluginError) and len(error.args) == 1 and type(error.args[0]) is str:
        return error.args[0]
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = ""
    if trace is not None:
        place = f" at {trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}"
    return f"raised {type(error).__name__}{place}"
