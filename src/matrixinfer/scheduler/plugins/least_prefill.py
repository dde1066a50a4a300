"""`least-prefill`: prefers pods that have the least to compute before this request's first token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from msgspec import Meta

from matrixinfer.config import Count, Section, described
from matrixinfer.scheduler.framework import Candidate, Plugin, SchedulingRequest, Scores, Services


class LeastPrefill(Plugin):
    """Scores by the prompt tokens that a pod must compute before the first token: its queue, and this prompt's misses.

    `cost = queued tokens + prompt tokens not cached there + requestTokens × requests there`, and
    `score = 100 × scaleTokens / (scaleTokens + cost − least cost)`. While `kvcache-aware` rates the share of a prompt that
    is cached, this plugin weighs the cached tokens against the queue: a small hit does not draw new conversations to a
    busy pod, and a large hit is worth a wait. Tokens whose ids are unknown are estimated from the prompt's bytes.
    """

    name: ClassVar[str] = "least-prefill"

    class Args(Section, frozen=True):
        """What a request costs besides its prompt, and how strong the preference is."""

        request_tokens: Annotated[
            int,
            Meta(ge=0),
            described("How much one request at a pod delays a new one while it decodes, in tokens of prefill."),
        ] = 500
        scale_tokens: Annotated[Count, described("Tokens above the least cost at which the score is 50.")] = 4096

    def __init__(self, args: Args, services: Services) -> None:
        self._request_tokens = args.request_tokens
        self._scale = args.scale_tokens

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Scores:
        prompt, size, per_request = request.whole_tokens, request.block_size, self._request_tokens
        costs = [
            pod.queued_tokens + max(0.0, prompt - pod.credit * size) + per_request * pod.load for pod in candidates
        ]
        scale, least = self._scale, min(costs, default=0)
        return Scores(values=[100.0 * (scale / (scale + (cost - least))) for cost in costs])
