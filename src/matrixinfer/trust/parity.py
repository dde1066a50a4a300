"""Whether our token ids are the engine's: the canary, and what follows when it differs.

Two things are compared all the time: the number of prompt tokens that answers report and, for a sample of requests, the
token ids themselves as the engine's events show them (`kvevents.witness`). After a run of mismatches the model is routed
approximately, by what this gateway has sent where instead of the index, until as many comparisons in a row agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Literal, TypeAlias

import structlog

from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.kvevents.witness import Witness
from matrixinfer.prompt.base import Prompt
from matrixinfer.telemetry.metrics import Metrics

Check: TypeAlias = Literal["usage", "events"]

RUN = 3
"""Mismatches in a row after which a model is routed approximately, and agreements after which it no longer is."""
SAMPLED_EVERY = 16
"""One request in this many has its token ids compared with the engine's events."""
_MAX_SAMPLES = 64
_GRACE_SECONDS = 1.0
"""How long after the answer's end its events may still come."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Verdict:
    """The comparisons of one kind for one model."""

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


@dataclass(slots=True, kw_only=True, eq=False)
class Sample:
    """A request whose blocks are being looked for in the events of the pod that computes it."""

    model: str
    pod: str
    path: str
    feed: PodFeed
    epoch: int
    """The feed's epoch when the sample began: in a later one, old blocks may have been published again."""
    witness: Witness
    until: float | None = None
    """When to judge it; None while the request is in flight."""
    void: bool = False


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
        self._parity.counted(self._model, pod=pod, path=self._prompt.path, ours=self._count, engines=engines)

    def watch(self, pod: str, feed: PodFeed, witness: Witness) -> None:
        """Start to look for the prompt in the engine's events."""
        self._sample = self._parity.watch(self._model, pod, self._prompt.path, feed, witness)

    def unwatch(self, *, computed: bool) -> None:
        """The request is over, or goes to another endpoint."""
        if self._sample is not None:
            self._parity.finished(self._sample, computed=computed)
            self._sample = None


@dataclass(slots=True)
class _Model:
    checks: dict[Check, Verdict]
    approximate: bool = False

    def view(self) -> dict[str, object]:
        checks: dict[str, object] = {name: check.view() for name, check in self.checks.items()}
        return {"approximate": self.approximate} | checks


class Parity:
    """The verdicts on all models. `clock` gives seconds and never goes back."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._models: dict[str, _Model] = {}
        self._samples: list[Sample] = []
        self._turns = itertools.count()

    def __len__(self) -> int:
        """Requests being looked for in events."""
        return len(self._samples)

    def is_approximate(self, model: str) -> bool:
        """Whether `model`'s token ids have lately differed."""
        known = self._models.get(model)
        return known is not None and known.approximate

    def view(self) -> dict[str, dict[str, object]]:
        """Every model compared so far, as JSON-able data."""
        self._settle()
        return {name: model.view() for name, model in self._models.items()}

    def keep_models(self, models: Container[str]) -> None:
        """Forget models that are not among these."""
        self._settle()
        self._models = {name: model for name, model in self._models.items() if name in models}

    def counted(self, model: str, *, pod: str, path: str, ours: int, engines: int) -> None:
        """An answer of `pod` reports `engines` prompt tokens where we counted `ours`."""
        self._note(model, "usage", agrees=ours == engines, pod=pod, path=path, ours=ours, engine=engines)

    def is_due(self) -> bool:
        """Whether this request belongs to the sample."""
        return next(self._turns) % SAMPLED_EVERY == 0

    def is_watched(self, feed: PodFeed) -> bool:
        """Whether a request is being looked for in `feed`, so that every other one sent there must be passed to `watch`."""
        self._settle()
        return feed.ledger.is_observed

    def watch(self, model: str, pod: str, path: str, feed: PodFeed, witness: Witness) -> Sample | None:
        """Look for a prompt in the blocks that `pod` stores from now on, unless another prompt is being looked for there.

        In that case the other search ends if its blocks could be confused with those of this prompt.
        """
        if feed.ledger.is_observed:
            self._crossed(feed, witness)
            return None
        if len(self._samples) >= _MAX_SAMPLES:
            return None
        sample = Sample(model=model, pod=pod, path=path, feed=feed, epoch=feed.epoch, witness=witness)
        feed.ledger.observe(witness)
        self._samples.append(sample)
        return sample

    def _crossed(self, feed: PodFeed, witness: Witness) -> None:
        """A prompt that may be like the one looked for in `feed` goes to the same pod."""
        for sample in self._samples:
            if sample.feed is feed and sample.witness.is_like(witness):
                feed.ledger.stop_observing(sample.witness)
                sample.void = sample.void or not sample.witness.chains

    def finished(self, sample: Sample, *, computed: bool) -> None:
        """The request of `sample` is over. Its last events may still come."""
        sample.void = sample.void or not computed
        sample.until = self._clock() + _GRACE_SECONDS if computed else self._clock()

    def _settle(self) -> None:
        """Judge the samples that are due."""
        if not self._samples:
            return
        now = self._clock()
        over = [sample for sample in self._samples if sample.until is not None and sample.until <= now]
        if over:
            self._samples = [sample for sample in self._samples if sample not in over]
        for sample in over:
            self._judge(sample)

    def _judge(self, sample: Sample) -> None:
        sample.feed.ledger.stop_observing(sample.witness)
        if sample.void or sample.feed.epoch != sample.epoch or sample.witness.chains != 1:
            self._model(sample.model).checks["events"].inconclusive += 1
            self._metrics.parity(sample.model, "events", "inconclusive")
            return
        position = sample.witness.first_difference
        self._note(
            sample.model,
            "events",
            agrees=position is None,
            pod=sample.pod,
            path=sample.path,
            first_difference=position,
        )

    def _note(self, name: str, check: Check, *, agrees: bool, **facts: object) -> None:
        model = self._model(name)
        verdict = model.checks[check]
        verdict.note(agrees=agrees)
        self._metrics.parity(name, check, "agreed" if agrees else "mismatch")
        if not agrees and _is_logged(verdict):
            log.warning("tokenizer_differed", model=name, check=check, times=verdict.mismatched, **facts)
        approximate = any(each.differing for each in model.checks.values())
        if approximate != model.approximate:
            model.approximate = approximate
            self._metrics.approximate(name, approximate)
            if approximate:
                log.warning("tokenizer_distrusted", model=name, check=check)
            else:
                log.info("tokenizer_trusted", model=name, check=check)

    def _model(self, name: str) -> _Model:
        known = self._models.get(name)
        if known is None:
            checks: dict[Check, Verdict] = {"usage": Verdict(), "events": Verdict()}
            known = self._models[name] = _Model(checks)
        return known


def _is_logged(verdict: Verdict) -> bool:
    """The first few mismatches are, then the 4th, 8th, 16th and so on."""
    return verdict.mismatched <= RUN or verdict.mismatched & (verdict.mismatched - 1) == 0
