"""A request that has been decided: its hold on the fleet, made when a pod is chosen, finished when the answer is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from matrixinfer.pods.registry import PodRegistry
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.openai import CHAT_PATH, COMPLETIONS_PATH
from matrixinfer.routing.decision_log import Record
from matrixinfer.scheduler.framework import Candidate, Decision
from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.traffic.load import Charge
from matrixinfer.trust.drift import Prediction
from matrixinfer.trust.parity import Comparison


class Route:
    """What the proxy tells of a request's way is passed on to whom it concerns.

    `charge` counts the request at a pod; `comparison` holds its tokens against the engine's and `prediction` the hit
    that the index foretells, where these can be told. `finished` is told at the end where the request has been.
    """

    __slots__ = (
        "_body",
        "_charge",
        "_charge_at",
        "_comparison",
        "_computed",
        "_finished",
        "_history",
        "_pod",
        "_prediction",
        "_record",
        "_registry",
        "_remembers",
        "_tried",
        "decision",
        "injects_usage",
        "prompt",
    )

    def __init__(
        self,
        decision: Decision,
        prompt: Prompt,
        body: bytes,
        *,
        registry: PodRegistry,
        charge: Callable[[Candidate], Charge],
        history: RoutingHistory,
        record: Record,
        comparison: Comparison | None,
        prediction: Prediction | None,
        finished: Callable[[Sequence[Candidate]], None],
        remembers: bool = False,
        injects_usage: bool = False,
    ) -> None:
        self.prompt = prompt
        self.decision = decision
        self._body = body
        self._registry = registry
        self._charge_at = charge
        self._pod = decision.chosen
        self._tried = [decision.chosen]
        self._finished = finished
        self._charge = charge(decision.chosen)
        self._history = history
        self._remembers = remembers
        self._record = record
        self._comparison = comparison
        self._prediction = prediction
        self._computed = False
        self.injects_usage = injects_usage and prompt.stream and prompt.path in (CHAT_PATH, COMPLETIONS_PATH)
        """Usage is asked for that the client did not ask for, and must not see; certain once `body_for` was called."""

    def move(self, pod: Candidate) -> None:
        """The request is tried at another pod."""
        self._charge.cancel()
        self._pod = pod
        self._tried.append(pod)
        self._charge = self._charge_at(pod)
        self._record.attempts.append(pod.name)
        if self._comparison is not None:
            self._comparison.unwatch(computed=False)
        self._end_prediction(computed=False)

    def failed(self, pod: Candidate) -> None:
        """The pod could not be reached."""
        self._registry.failed(pod.pod)

    def answered(self, pod: Candidate, status: int) -> None:
        """The pod sent response headers."""
        self._record.status = status
        if status < 500:  # else it is alive, but not well
            self._registry.answered(pod.pod)

    def first_byte(self) -> None:
        """The prompt has been computed: the pod holds its blocks."""
        self._computed = True
        self._charge.first_byte()
        if self._prediction is not None:
            self._prediction.first_byte()

    @property
    def wants_usage(self) -> bool:
        """Whether the answer may say how many tokens the prompt has."""
        return self.prompt.counted

    def used(self, pod: Candidate, prompt_tokens: int, cached_tokens: int | None) -> None:
        """The answer of `pod` says how many tokens the prompt has, and how many were cached."""
        self._record.counted, self._record.cached = prompt_tokens, cached_tokens
        if self._comparison is not None:
            self._comparison.counted(pod.name, prompt_tokens)
        if self._prediction is not None:
            self._prediction.reported(cached_tokens)

    def finish(self) -> None:
        """The request is over, however it ended."""
        if self._computed:
            self._charge.release()
            self._remember()
        else:
            self._charge.cancel()
        if self._comparison is not None:
            self._comparison.unwatch(computed=self._computed)
        self._end_prediction(computed=self._computed)
        self._finished(self._tried)

    def _remember(self) -> None:
        """What was sent stands in for what the pod's events do not tell."""
        pod, request = self._pod, self.decision.request
        if self._remembers or pod.trust != "exact":
            self._history.record_sent(pod.name, request.model, request.chain)
        elif pod.name in self._history:
            self._history.forget(pod.name)

    def _end_prediction(self, *, computed: bool) -> None:
        if self._prediction is not None:
            self._prediction.end(computed=computed)
            self._prediction = None

    def body_for(self, pod: Candidate) -> bytes:
        """The client's bytes, unless the pod knows the model under another name, or usage is asked for."""
        name = self._registry.name_at(pod.pod, self.prompt.model)
        fields: dict[str, msgspec.Raw] = {}
        if self.injects_usage or name != self.prompt.model:
            fields = msgspec.json.decode(self._body, type=dict[str, msgspec.Raw])
        if self.injects_usage:
            options = _asking_for_usage(fields.get("stream_options"))
            self.injects_usage = options is not None
            if options is not None:
                fields["stream_options"] = options
        if name == self.prompt.model and not self.injects_usage:
            return self._body
        fields["model"] = msgspec.Raw(msgspec.json.encode(name))
        return msgspec.json.encode(fields)


def _asking_for_usage(options: msgspec.Raw | None) -> msgspec.Raw | None:
    """A request's `stream_options`, so that usage is reported once, at the end; None where the client's own must stay.

    They must where they ask for usage, and where the engine will refuse them.
    """
    given = None if options is None else msgspec.json.decode(options)
    if given is None:
        given = {}
    if not isinstance(given, dict) or given.get("include_usage") not in (None, False):
        return None
    kept = {key: value for key, value in given.items() if key != "continuous_usage_stats"}
    return msgspec.Raw(msgspec.json.encode(kept | {"include_usage": True}))
