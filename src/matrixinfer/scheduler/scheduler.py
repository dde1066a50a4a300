"""Runs a profile: filters, scorers, the picker, and then whoever wants to know.

A plugin may be anyone's code. One that raises, or answers what the contract forbids, has no say in that decision: a
note tells so, `Scheduler.rejected` counts it, and the request is still routed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import index
from types import MappingProxyType
from typing import TypeVar

from matrixinfer.config import SchedulerConfig
from matrixinfer.errors import NoPodAvailable, PluginError
from matrixinfer.scheduler.framework import (
    Candidate,
    Decision,
    Filter,
    Picker,
    Plugin,
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
    """Decides which pod takes a request. Synchronous, without I/O; one call at a time.

    `registry` maps names to plugin classes. Raises `ConfigError` when the profile in `config` does not fit it.
    """

    def __init__(self, config: SchedulerConfig, services: Services, registry: Mapping[str, type[Plugin]]) -> None:
        self._services = services
        self._profile = build(config, services, registry)
        self.rejected: dict[str, int] = dict.fromkeys(self._profile.plugins, 0)
        """How often each enabled plugin raised or answered what the contract forbids."""

    @property
    def plugins(self) -> Mapping[str, Plugin]:
        """The enabled plugins by name."""
        return MappingProxyType(dict(self._profile.plugins))

    def schedule(
        self, request: SchedulingRequest, candidates: Sequence[Candidate], *, dry_run: bool = False
    ) -> Decision:
        """Rank `candidates` for `request`. A dry run changes no state: no draw, no count, no plugin's memory.

        Raises `NoPodAvailable` when there are no candidates.
        """
        if not candidates:
            raise NoPodAvailable(f"no pod serves the model `{request.model}` now")
        attempts = _Attempts(self._services.clock)
        if dry_run:
            state = self._services.rng.getstate()
            try:
                return self._decide(request, tuple(candidates), attempts)
            finally:
                self._services.rng.setstate(state)
        decision = self._decide(request, tuple(candidates), attempts)
        if self._profile.listeners:
            decision = self._tell(request, decision, attempts)
        for name in attempts.failed:
            self.rejected[name] += 1
        return decision

    def _decide(self, request: SchedulingRequest, candidates: tuple[Candidate, ...], attempts: _Attempts) -> Decision:
        pods, filtered = self._filter(request, candidates, attempts)
        names = [pod.name for pod in pods]
        totals = [0.0] * len(pods)
        scores: dict[str, Mapping[str, float]] = {}
        for name, weight, scorer in self._profile.scorers:
            answer = attempts.run(name, _score, scorer, request, pods)
            if answer is None:
                continue
            scores[name] = dict(zip(names, answer.values, strict=True))
            totals = [total + weight * value for total, value in zip(totals, answer.values, strict=True)]
            if answer.note is not None:
                attempts.notes.append(f"{name}: {answer.note}")
        name, picker = self._profile.picker
        order = attempts.run(name, _pick, picker, request, pods, totals)
        if order is None:
            order = sorted(range(len(pods)), key=totals.__getitem__, reverse=True)
        return Decision(
            request=request,
            candidates=candidates,
            ranked=[pods[i] for i in order],
            filtered=filtered,
            scores=scores,
            totals=dict(zip(names, totals, strict=True)),
            timings_ms=attempts.timings_ms,
            notes=tuple(attempts.notes),
        )

    def _filter(
        self, request: SchedulingRequest, pods: tuple[Candidate, ...], attempts: _Attempts
    ) -> tuple[tuple[Candidate, ...], dict[str, str]]:
        filtered: dict[str, str] = {}
        for name, plugin in self._profile.filters:
            reasons = attempts.run(name, _filter, plugin, request, pods)
            if reasons is None or reasons.count(None) == len(pods):
                continue
            kept = tuple(pod for pod, reason in zip(pods, reasons, strict=True) if reason is None)
            if not kept:
                attempts.notes.append(f"{name}: set aside, as it would remove every pod that is left")
                continue
            for pod, reason in zip(pods, reasons, strict=True):
                if reason is not None:
                    filtered[pod.name] = f"{name}: {reason}"
            pods = kept
        return pods, filtered

    def _tell(self, request: SchedulingRequest, decision: Decision, attempts: _Attempts) -> Decision:
        for name, listener in self._profile.listeners:
            attempts.run(name, _post_schedule, listener, request, decision)
        return replace(decision, timings_ms=attempts.timings_ms, notes=tuple(attempts.notes))


class _Attempts:
    """What running the plugins of one decision gave besides their answers."""

    __slots__ = ("_clock", "failed", "notes", "timings_ms")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.failed: list[str] = []
        self.notes: list[str] = []
        self.timings_ms: dict[str, float] = {}

    def run(self, name: str, stage: Callable[..., T], *args: object) -> T | None:
        """Return the stage's checked answer, or None when the plugin `name` has no say in this decision."""
        start = self._clock()
        try:
            return stage(*args)
        except Exception as error:  # noqa: BLE001  # Supervision boundary: no plugin may fail a request.
            self.failed.append(name)
            self.notes.append(f"{name}: left out, as it {_what_happened(error)}")
            return None
        finally:
            elapsed = (self._clock() - start) * 1e3
            self.timings_ms[name] = self.timings_ms.get(name, 0.0) + elapsed


def _filter(plugin: Filter, request: SchedulingRequest, pods: Pods) -> list[str | None]:
    reasons = list(plugin.filter(request, pods))
    if len(reasons) != len(pods):
        raise PluginError(f"answered {len(reasons)} reasons for {len(pods)} pods")
    if reasons.count(None) != len(pods) and not all(reason is None or isinstance(reason, str) for reason in reasons):
        raise PluginError("answered a reason that is neither text nor None")
    return reasons


def _score(plugin: Scorer, request: SchedulingRequest, pods: Pods) -> Scores:
    answer = plugin.score(request, pods)
    values = list(map(float, answer.values))
    if len(values) != len(pods):
        raise PluginError(f"answered {len(values)} scores for {len(pods)} pods")
    # `min` and `max` may step over a NaN; a sum cannot.
    if not (min(values) >= 0.0 and max(values) <= 100.0 and math.isfinite(sum(values))):
        raise PluginError("answered a score that is not between 0 and 100")
    return Scores(values=values, note=answer.note)


def _pick(plugin: Picker, request: SchedulingRequest, pods: Pods, totals: Sequence[float]) -> list[int]:
    order = list(map(index, plugin.pick(request, pods, tuple(totals))))
    if sorted(order) != list(range(len(pods))):
        raise PluginError("did not rank every pod once")
    return order


def _post_schedule(plugin: PostSchedule, request: SchedulingRequest, decision: Decision) -> None:
    plugin.post_schedule(request, decision)


def _what_happened(error: Exception) -> str:
    """Tell a failure in words. Foreign messages may quote the prompt, so of those only type and place are told."""
    if isinstance(error, PluginError):
        return str(error)
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = ""
    if trace is not None:
        place = f" at {trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}"
    return f"raised {type(error).__name__}{place}"
