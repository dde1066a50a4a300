"""A request that has been decided: its hold on the fleet, made when a pod is chosen, finished when the answer is."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from matrixinfer.drift import Prediction
from matrixinfer.parity import Comparison
from matrixinfer.pods.registry import PodRegistry
from matrixinfer.prompt.base import Prompt
from matrixinfer.scheduler.framework import Candidate, Decision
from matrixinfer.scheduler.load import Charge


class Route:
    """What the proxy tells of a request's way is passed on to whom it concerns.

    `charge` counts the request at a pod; `comparison` holds its tokens against the engine's and `prediction` the hit
    that the index foretells, where these can be told.
    """

    __slots__ = (
        "_body",
        "_charge",
        "_charge_at",
        "_comparison",
        "_computed",
        "_prediction",
        "_registry",
        "decision",
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
        comparison: Comparison | None,
        prediction: Prediction | None,
    ) -> None:
        self.prompt = prompt
        self.decision = decision
        self._body = body
        self._registry = registry
        self._charge_at = charge
        self._charge = charge(decision.chosen)
        self._comparison = comparison
        self._prediction = prediction
        self._computed = False

    def move(self, pod: Candidate) -> None:
        """The request is tried at another pod."""
        self._charge.cancel()
        self._charge = self._charge_at(pod)
        if self._comparison is not None:
            self._comparison.unwatch(computed=False)
        self._end_prediction(computed=False)

    def failed(self, pod: Candidate) -> None:
        """The pod could not be reached."""
        self._registry.failed(pod.pod)

    def answered(self, pod: Candidate) -> None:
        """The pod sent response headers."""
        self._registry.answered(pod.pod)

    def first_byte(self) -> None:
        """The prompt has been computed: the pod holds its blocks."""
        self._computed = True
        self._charge.first_byte()
        if self._prediction is not None:
            self._prediction.first_byte()

    @property
    def wants_usage(self) -> bool:
        """Whether it is worth knowing how many prompt tokens the engine has counted."""
        return self.prompt.counted and (self._comparison is not None or self._prediction is not None)

    def used(self, pod: Candidate, prompt_tokens: int, cached_tokens: int | None) -> None:
        """The answer of `pod` says how many tokens the prompt has, and how many were cached. Only if `wants_usage`."""
        if self._comparison is not None and self._comparison.of_counts:
            self._comparison.counted(pod.name, prompt_tokens)
        if self._prediction is not None:
            self._prediction.reported(cached_tokens)

    def finish(self) -> None:
        """The request is over, however it ended."""
        if self._computed:
            self._charge.release()
        else:
            self._charge.cancel()
        if self._comparison is not None:
            self._comparison.unwatch(computed=self._computed)
        self._end_prediction(computed=self._computed)

    def _end_prediction(self, *, computed: bool) -> None:
        if self._prediction is not None:
            self._prediction.end(computed=computed)
            self._prediction = None

    def body_for(self, pod: Candidate) -> bytes:
        """The client's bytes; only where the pod knows the model under another name is that field rewritten."""
        name = self._registry.name_at(pod.pod, self.prompt.model)
        if name == self.prompt.model:
            return self._body
        fields = msgspec.json.decode(self._body, type=dict[str, msgspec.Raw])
        fields["model"] = msgspec.Raw(msgspec.json.encode(name))
        return msgspec.json.encode(fields)
