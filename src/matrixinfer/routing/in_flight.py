"""A dispatched request: what it holds at its endpoint, and what the front reports about it, until its answer is over."""

from __future__ import annotations

from collections.abc import Callable

from matrixinfer.pods.outliers import Outliers
from matrixinfer.pods.registry import PodRegistry
from matrixinfer.routing.audit import Audit
from matrixinfer.routing.blame import Blame
from matrixinfer.routing.decision_log import Record
from matrixinfer.routing.prepared import Prepared
from matrixinfer.scheduler.framework import Candidate, Decision
from matrixinfer.traffic.load import Charge

_TOO_MANY = 429
_DOUBTFUL = ("disconnect", "protocol")
"""Failures that a request may bring about at any engine."""


class InFlight:
    """A request that is charged to an endpoint. The front reports its progress; `Router.dispatch` closes it.

    `charge` is what it holds at the chosen endpoint; `charge_at` charges another one.
    """

    __slots__ = (
        "_audit",
        "_blame",
        "_charge",
        "_charge_at",
        "_is_over",
        "_outliers",
        "_record",
        "_registry",
        "_sent_at",
        "computed",
        "decision",
        "is_probe",
        "pod",
        "prepared",
        "request",
        "tried",
    )

    def __init__(
        self,
        prepared: Prepared,
        decision: Decision,
        *,
        registry: PodRegistry,
        outliers: Outliers,
        charge: Charge,
        charge_at: Callable[[Candidate], Charge],
        audit: Audit,
        record: Record,
    ) -> None:
        self.prepared = prepared
        self.decision = decision
        self.pod = decision.chosen
        """The endpoint that has the request now."""
        self.tried = [decision.chosen]
        """Every endpoint that had it, in order."""
        self.computed = False
        """Whether an engine has computed the prompt."""
        self.request = decision.request
        """The request as decided, or with the token ids that came after that."""
        self._is_over = False
        self.is_probe = outliers.started(decision.chosen.name)
        """Whether this request finds out if an ejected endpoint works again, and has not done so yet."""
        self._sent_at = outliers.now()
        self._blame = Blame(outliers)
        self._registry = registry
        self._outliers = outliers
        self._charge = charge
        self._charge_at = charge_at
        self._audit = audit
        self._record = record

    @property
    def is_over(self) -> bool:
        """Whether its answer is over."""
        return self._is_over

    @property
    def cached(self) -> int | None:
        """Prompt tokens that the engine reused; None if its answer does not report them."""
        return self._record.cached

    @property
    def record(self) -> Record:
        """What is kept of the decision, and of what came of it."""
        return self._record

    @property
    def wants_usage(self) -> bool:
        """Whether the token count that the answer reports is that of this prompt."""
        return self.prepared.prompt.counted

    @property
    def is_sampled(self) -> bool:
        """Whether the engine's events are to show its token ids, which proves something only if the engine makes them."""
        return self._audit.is_sampled

    def sends_ids(self, *, sends: bool) -> None:
        """Whether the endpoint gets the prompt's token ids with the request."""
        self._record.sent_ids = sends
        if sends:
            self._audit.sends_ids()

    def watch_down(self, pod: str, act: Callable[[], None]) -> None:
        """Call `act` when a pod is declared down, until `unwatch_down`."""
        self._registry.watch_down(pod, act)

    def unwatch_down(self, pod: str, act: Callable[[], None]) -> None:
        """Undo `watch_down`."""
        self._registry.unwatch_down(pod, act)

    @property
    def needs_witness(self) -> bool:
        """Whether the request has failed, and its endpoint would be ejected if another one answered it."""
        return self._blame.needs_witness

    def following(self) -> Candidate | None:
        """The endpoint that gets the request if this one does not answer it; None if all have had it.

        If the request may be to blame, that is the endpoint whose answer says most: one that has not failed lately.
        """
        witness = self._witness() if self._blame else None
        if witness is not None:
            return witness
        pods = {each.pod for each in self.tried}
        return next((each for each in self.decision.attempts if each.pod not in pods), None)

    def _witness(self) -> Candidate | None:
        pods, names = {each.pod for each in self.tried}, {each.name for each in self.tried}
        filtered = self.decision.filtered
        ordered = (*self.decision.ranked, *(each for each in self.decision.candidates if each.name in filtered))
        able = [each for each in ordered if each.name not in names and each.withheld is None]
        return min(able, key=lambda each: (self._outliers.failures(each.name), each.pod in pods), default=None)

    def move(self, pod: Candidate) -> None:
        """Send the request to another endpoint."""
        self._blame.moved()
        self._end_probe()
        self._charge.cancel()
        self._charge = self._charge_at(pod)
        self._audit.moved()
        self._record.moved(pod.name)
        self.tried.append(pod)
        self.pod = pod
        self.is_probe = self._outliers.started(pod.name)
        self._sent_at = self._outliers.now()

    def learned(
        self, late: Prepared, here: Callable[[], Candidate | None], charge_at: Callable[[Candidate], Charge]
    ) -> bool:
        """The token ids have come after the decision. Returns whether its endpoint still exists.

        `late` is the request that has them. `here` gives its endpoint as known now, None if that has gone; `charge_at`
        charges an endpoint with the prompt's tokens and blocks.
        """
        self.request = late.request
        self._charge_at = charge_at
        if not self._is_over:
            self._charge.cancel()  # else the prompt would be found at its endpoint, where it is only expected
        endpoint = here()
        is_predicted = self._audit.learned(late, endpoint)
        self._record.learned(late.request, endpoint if is_predicted else None)
        if endpoint is not None and not self._is_over:
            self._charge = charge_at(endpoint)
            self._charge.untimed()
            if self.computed:
                self._charge.first_byte()
        return endpoint is not None

    def failed(self, kind: str) -> None:
        """Its endpoint could not be reached, broke the connection or did not answer; the client has got nothing."""
        self._record.failed()
        if kind.startswith("connect"):  # anything else may be the fault of this request
            self._registry.failed(self.pod.pod)
        if kind == "timeout":
            self.timed_out()
        elif kind in _DOUBTFUL:
            self._accuse(kind)
        else:
            self.broke(kind)

    def timed_out(self) -> None:
        """Its endpoint did not begin an answer in time. One that is not streamed begins when it is complete.

        Then the request is long, and the endpoint works, if it has begun other answers meanwhile.
        """
        if self.prepared.prompt.stream or not self._outliers.has_computed(self.pod.name, self._sent_at):
            self.broke("timeout")

    def broke(self, kind: str) -> None:
        """Its endpoint failed the request, if only in the middle of the answer."""
        self._outliers.failed(self.pod.name, kind, probe=self.is_probe)
        self.is_probe = False

    def answered(self, status: int, retry_after: float | None = None) -> None:
        """Its endpoint has sent response headers. `retry_after`: for how many seconds it wants to be left alone."""
        self._record.answered(status)
        if status < 500:  # otherwise the pod is alive, but not well
            self._registry.answered(self.pod.pod)
        if status in (_TOO_MANY, 503):
            self._outliers.busy(self.pod.name, retry_after=retry_after, probe=self.is_probe)
            if status == _TOO_MANY:
                self._blame.limited(self.pod.name)
        elif status >= 500:
            self._accuse(str(status))
            return
        elif status >= 400:
            self._blame.void()
            self._succeeded()
        else:
            return  # its first byte is still to come
        self.is_probe = False

    def first_byte(self, seconds: float | None = None) -> None:
        """The prompt has been computed: its blocks are at the endpoint now. `seconds` have passed since the request."""
        self.computed = True
        if seconds is not None:
            self._record.first_byte(seconds)
        self._blame.answered()
        self._outliers.computed(self.pod.name)
        self._succeeded()
        self._charge.first_byte()
        self._audit.first_byte()

    def usage(self, prompt_tokens: int, cached_tokens: int | None) -> None:
        """The answer reports how many tokens the prompt has, and how many were cached if it says so."""
        self._record.usage(prompt_tokens, cached_tokens)
        self._audit.usage(self.pod.name, prompt_tokens, cached_tokens)

    def close(self) -> None:
        """The request is over, however it ended. `Router.dispatch` calls this once."""
        self._is_over = self._record.is_over = True
        if self.prepared.late is not None:
            self.prepared = self.prepared.without_body()  # the token ids, when they come, find this object
        self._blame.close()
        self._end_probe()
        try:
            if self.computed:
                self._charge.release()
            else:
                self._charge.cancel()
        finally:
            self._audit.close(computed=self.computed)

    def _accuse(self, reason: str) -> None:
        self._blame.accuse(self.pod.name, reason, is_probe=self.is_probe)
        self.is_probe = False  # the verdict ends the probe

    def _succeeded(self) -> None:
        self._outliers.succeeded(self.pod.name, probe=self.is_probe)
        self.is_probe = False

    def _end_probe(self) -> None:
        if self.is_probe:
            self._outliers.abandoned(self.pod.name)
            self.is_probe = False
