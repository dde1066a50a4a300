"""`least-prefill`: prefers the pod that has the least to compute before this request's first token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from msgspec import Meta

from matrixinfer.config import Count, Section, described
from matrixinfer.scheduler.framework import Candidate, Plugin, SchedulingRequest, Scores, Services


class LeastPrefill(Plugin):
    """Scores by the prompt tokens that stand before the first token: those queued at the pod and those it misses.

    `cost = queued tokens + prompt tokens not cached there + requestTokens × requests there`, and
    `score = 100 × scaleTokens / (scaleTokens + cost − least cost)`. Where `kvcache-aware` rates what share of a prompt is
    cached, this weighs it in tokens against the queue: a small gain does not draw new conversations to a busy pod, a
    large one is worth waiting for. A prompt that was not tokenized counts as missed everywhere.
    """

    name: ClassVar[str] = "least-prefill"

    class Args(Section, frozen=True):
        """What a request costs besides its prompt, and how sharp the preference is."""

        request_tokens: Annotated[
            int, Meta(ge=0), described("Tokens of prefill that one request at a pod slows a new one by, as it decodes.")
        ] = 500
        scale_tokens: Annotated[Count, described("Tokens above the least cost at which the score is 50.")] = 4096

    def __init__(self, args: Args, services: Services) -> None:
        self._request_tokens = args.request_tokens
        self._scale = args.scale_tokens

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Scores:
        """See the class."""
        prompt, size, per_request = request.prompt_tokens or 0, request.block_size, self._request_tokens
        costs = [
            pod.queued_tokens + max(0.0, prompt - pod.credit * size) + per_request * pod.load for pod in candidates
        ]
        scale, least = self._scale, min(costs, default=0)
        return Scores(values=[100.0 * (scale / (scale + cost - least)) for cost in costs])
