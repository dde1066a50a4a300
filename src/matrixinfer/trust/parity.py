"""Whether our token ids are the engine's: the canary, and what follows when it differs.

Two things are compared all the time: the number of prompt tokens that answers report and, for a sample of requests, the
token ids themselves as the engine's events show them (`trust.sampling`). Each class of request (`prompt.request_class`)
is judged by itself, since an engine may render one differently and all others alike. After a run of mismatches requests
of that class are routed approximately, by what this gateway has sent where instead of the index, until as many
comparisons in a row agree.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import structlog

from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.kvevents.witness import Witness
from matrixinfer.prompt.base import Prompt
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.trust.sampling import Outcome, Present, Sample, Sampling

Check: TypeAlias = Literal["usage", "events"]

RUN = 3
"""Mismatches in a row after which a class is routed approximately, and agreements after which it no longer is."""
SAMPLED_EVERY = 16
"""One request in this many of a class has its token ids compared with the engine's events, once `RUN` have agreed."""
_STALE = 256
"""After so many requests without such a comparison, earlier ones prove nothing any more."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Verdict:
    """The comparisons of one kind for one class of a model's requests."""

    agreed: int = 0
    mismatched: int = 0
    inconclusive: int = 0
    differing: bool = False
    """A run of mismatches, and no run of agreements since."""
    streak: int = 0
    """Length of the current run: positive for agreements, negative for mismatches."""

    def note(self, *, agrees: bool) -> None:
        """One more comparison."""
        self.agreed += agrees
        self.mismatched += not agrees
        self.streak = max(self.streak, 0) + 1 if agrees else min(self.streak, 0) - 1
        if abs(self.streak) >= RUN:
            self.differing = not agrees

    def view(self) -> dict[str, int]:
        """As JSON-able data."""
        return {
            "agreed": self.agreed,
            "mismatched": self.mismatched,
            "inconclusive": self.inconclusive,
            "streak": self.streak,
        }


class Comparison:
    """One prompt's token ids, compared with what its engine reports about them."""

    __slots__ = ("_count", "_model", "_parity", "_prompt", "_sample")

    def __init__(self, parity: Parity, model: str, prompt: Prompt, count: int) -> None:
        self._parity = parity
        self._model = model
        self._prompt = prompt
        self._count = count
        self._sample: Sample | None = None

    def counted(self, pod: str, engines: int) -> None:
        """The engine `pod` counted `engines` prompt tokens. Call it only for prompts that are `counted`."""
        prompt = self._prompt
        self._parity.counted(
            self._model, prompt.request_class, pod=pod, path=prompt.path, ours=self._count, engines=engines
        )

    @property
    def is_sampled(self) -> bool:
        """Whether the prompt is being looked for in the engine's events."""
        return self._sample is not None

    def is_due(self, pod: str, feed: PodFeed) -> bool:
        """Whether this request is to be sampled at the endpoint `pod`."""
        is_due = self._parity.is_due(self._model, self._prompt.request_class, pod)
        return is_due and self._parity.sampling.can_watch(feed)

    def watch(self, pod: str, feed: PodFeed, witness: Witness, present: Present) -> None:
        """Start to look for the prompt in the engine's events. `present` is the request's entry in the sampling."""
        prompt = self._prompt
        self._sample = self._parity.sampling.watch(
            feed,
            witness,
            present,
            model=self._model,
            request_class=prompt.request_class,
            pod=pod,
            path=prompt.path,
        )
        if self._sample is not None:
            self._parity.sampled(self._model, prompt.request_class)

    def unwatch(self, *, computed: bool) -> None:
        """The request is over, or goes to another endpoint."""
        sample, self._sample = self._sample, None
        if sample is not None:
            self._parity.sampling.finished(sample, computed=computed)


@dataclass(slots=True)
class _Class:
    checks: dict[Check, Verdict] = field(default_factory=lambda: {"usage": Verdict(), "events": Verdict()})
    approximate: bool = False
    unsampled: int = 0
    """Requests since the last one that was sampled."""
    agreed_at: dict[str, int] = field(default_factory=dict)
    """By endpoint: how often its events have agreed since a comparison with it last did not."""

    def note_at(self, endpoint: str, check: Check, *, agrees: bool) -> None:
        """One more comparison with an endpoint."""
        if not agrees:
            self.agreed_at.pop(endpoint, None)
        elif check == "events":
            self.agreed_at[endpoint] = self.agreed_at.get(endpoint, 0) + 1

    def view(self) -> dict[str, object]:
        checks: dict[str, object] = {name: check.view() for name, check in self.checks.items()}
        proven = sorted(endpoint for endpoint, agreed in self.agreed_at.items() if agreed >= RUN)
        return {"approximate": self.approximate} | checks | ({"proven_at": proven} if proven else {})


class Parity:
    """The verdicts on all models, by class of request. `clock` gives seconds and never goes back.

    `proves_endpoints`: samples are taken at each endpoint until they prove that its ids are ours; see `is_proven`.
    """

    def __init__(self, metrics: Metrics, clock: Callable[[], float], *, proves_endpoints: bool = False) -> None:
        self._metrics = metrics
        self._proves_endpoints = proves_endpoints
        self._models: dict[str, dict[str, _Class]] = {}
        self.sampling = Sampling(clock, self._judged)

    def is_approximate(self, model: str, request_class: str) -> bool:
        """Whether the token ids of `model` have lately differed for this class of request."""
        known = self._models.get(model, {}).get(request_class)
        return known is not None and known.approximate

    def is_proven(self, model: str, request_class: str, endpoint: str) -> bool:
        """Whether the events of `endpoint` have shown our token ids, and nothing lately has spoken against them.

        One endpoint may render what all others do not, so each of them is judged by itself, too.
        """
        known = self._models.get(model, {}).get(request_class)
        if known is None or known.approximate or known.unsampled >= _STALE:
            return False
        is_agreed = known.checks["events"].streak >= RUN and known.checks["usage"].streak >= 0
        return is_agreed and known.agreed_at.get(endpoint, 0) >= RUN

    def forget(self, endpoint: str) -> None:
        """An endpoint has gone, or its engine is another one now."""
        for classes in self._models.values():
            for known in classes.values():
                known.agreed_at.pop(endpoint, None)

    def unprove(self, model: str) -> None:
        """The token ids of `model` come from another tokenizer from now on: no endpoint has shown these."""
        for known in self._models.get(model, {}).values():
            known.agreed_at.clear()

    def view(self) -> dict[str, dict[str, object]]:
        """Every model compared so far, with its classes of request, as JSON-able data."""
        self.sampling.settle()
        return {
            name: {
                "approximate": any(each.approximate for each in classes.values()),
                "classes": {request_class: each.view() for request_class, each in sorted(classes.items())},
            }
            for name, classes in self._models.items()
        }

    def keep_models(self, models: Container[str]) -> None:
        """Forget models that are not among these."""
        self.sampling.settle()
        self.sampling.forget_gone()
        self._models = {name: classes for name, classes in self._models.items() if name in models}

    def counted(self, model: str, request_class: str, *, pod: str, path: str, ours: int, engines: int) -> None:
        """An answer of `pod` reports `engines` prompt tokens where we counted `ours`."""
        self._note(model, request_class, "usage", agrees=ours == engines, pod=pod, path=path, ours=ours, engine=engines)

    def is_due(self, model: str, request_class: str, endpoint: str) -> bool:
        """Whether this request should be sampled: all are until a run of agreements, then one in `SAMPLED_EVERY`."""
        known = self._class(model, request_class)
        known.unsampled += 1
        if known.checks["events"].streak < RUN or known.unsampled >= SAMPLED_EVERY:
            return True
        return self._proves_endpoints and known.agreed_at.get(endpoint, 0) < RUN

    def sampled(self, model: str, request_class: str) -> None:
        """A request of this class is being sampled."""
        self._class(model, request_class).unsampled = 0

    def _judged(self, sample: Sample) -> None:
        outcome: Outcome
        outcome, position = sample.outcome()
        if outcome == "inconclusive":
            self._class(sample.model, sample.request_class).checks["events"].inconclusive += 1
            self._metrics.parity(sample.model, sample.request_class, "events", "inconclusive")
            return
        self._note(
            sample.model,
            sample.request_class,
            "events",
            agrees=outcome == "agrees",
            pod=sample.pod,
            path=sample.path,
            first_difference=position,
        )

    def _note(self, model: str, request_class: str, check: Check, *, agrees: bool, pod: str, **facts: object) -> None:
        known = self._class(model, request_class)
        if self._proves_endpoints:
            known.note_at(pod, check, agrees=agrees)
        verdict = known.checks[check]
        verdict.note(agrees=agrees)
        self._metrics.parity(model, request_class, check, "agreed" if agrees else "mismatch")
        where = {"model": model, "class": request_class, "check": check}
        if not agrees and _is_logged(verdict):
            log.warning("tokenizer_differed", **where, times=verdict.mismatched, pod=pod, **facts)
        approximate = any(each.differing for each in known.checks.values())
        if approximate != known.approximate:
            known.approximate = approximate
            self._metrics.approximate(model, request_class, approximate)
            if approximate:
                log.warning("tokenizer_distrusted", **where)
            else:
                log.info("tokenizer_trusted", **where)

    def _class(self, model: str, request_class: str) -> _Class:
        classes = self._models.setdefault(model, {})
        known = classes.get(request_class)
        if known is None:
            known = classes[request_class] = _Class()
        return known


def _is_logged(verdict: Verdict) -> bool:
    """The first few mismatches are, then the 4th, 8th, 16th and so on."""
    return verdict.mismatched <= RUN or verdict.mismatched & (verdict.mismatched - 1) == 0
