"""Models of the published routing rules of other systems, with their default parameters: the rules, not the systems.

A rule that counts blocks that engines report gets what this gateway knows from KV events; a rule that remembers what it
has sent gets such a memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from matrixinfer.scheduler.framework import Candidate, SchedulingRequest
from matrixinfer.study.baselines import Approximate, Baseline
from matrixinfer.study.jobs import Job

Pick: TypeAlias = Callable[[SchedulingRequest, Sequence[Candidate], Mapping[str, int]], Candidate]
"""Gets a request, its candidates, and the tokens of the prompts in flight at each pod. Returns the chosen candidate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A published rule; either `pick`, over what KV events report, or `baseline`."""

    name: str
    summary: str
    source: str
    pick: Pick | None = None
    baseline: type[Baseline] = Baseline


def lmetric(request: SchedulingRequest, candidates: Sequence[Candidate], ongoing: Mapping[str, int]) -> Candidate:
    """Tokens to prefill, queued ones and this prompt's misses, times the batch with this request."""
    return min(candidates, key=lambda pod: (_new_tokens(request, pod) + pod.queued_tokens) * (pod.load + 1))


def dynamo_kv(request: SchedulingRequest, candidates: Sequence[Candidate], ongoing: Mapping[str, int]) -> Candidate:
    """Blocks to prefill, queued ones and this prompt's misses, plus the active blocks, with this request's; both weigh 1."""

    def cost(pod: Candidate) -> float:
        prefill = _new_tokens(request, pod) + pod.queued_tokens
        return prefill + ongoing.get(pod.name, 0) + request.whole_tokens

    return min(candidates, key=cost)


class SglangCacheAware(Approximate):
    """The longest match if it is more than 0.3 of the prompt, else the fewest requests; always the latter out of balance."""

    CACHE_THRESHOLD, ABSOLUTE, RELATIVE = 0.3, 64, 1.5

    def choose(self, job: Job, pods: Sequence[str]) -> str:
        """Out of balance means more than 64 requests and a factor of 1.5 between the most and the fewest."""
        counts = [self.in_flight[pod] for pod in pods]
        if max(counts) - min(counts) > self.ABSOLUTE and max(counts) > self.RELATIVE * min(counts):
            return self.least(pods)
        matches = {pod: self.matched(job, pod) for pod in pods}
        best = max(matches.values())
        if best > self.CACHE_THRESHOLD * job.prompt:
            return next(pod for pod in pods if matches[pod] == best)
        return self.least(pods)


class AibrixPrefixCache(Approximate):
    """The least loaded of the pods with the longest match; the fewest requests without one, or out of balance."""

    IMBALANCE = 8

    def choose(self, job: Job, pods: Sequence[str]) -> str:
        """Out of balance means more than 8 requests between the most and the fewest."""
        counts = [self.in_flight[pod] for pod in pods]
        if max(counts) - min(counts) > self.IMBALANCE:
            return self.least(pods)
        matches = {pod: self.matched(job, pod) for pod in pods}
        best = max(matches.values())
        return self.least([pod for pod in pods if matches[pod] == best])


def _new_tokens(request: SchedulingRequest, pod: Candidate) -> int:
    return request.whole_tokens - pod.predicted_hit(request.prompt_tokens, request.block_size)


RULES: Sequence[Rule] = (
    Rule(
        name="lmetric",
        summary="new prefill tokens × (batch + 1), from KV events",
        source="Zhang et al., LMetric, arXiv:2603.15202",
        pick=lmetric,
    ),
    Rule(
        name="dynamo_kv",
        summary="the rule of NVIDIA Dynamo's KV router, from KV events: prefill blocks + decode blocks",
        source="https://docs.nvidia.com/dynamo/latest/components/router/README.html",
        pick=dynamo_kv,
    ),
    Rule(
        name="sglang_cache_aware",
        summary="the rule `cache_aware` of SGLang's router, from what it has sent",
        source="https://github.com/sgl-project/sglang/blob/main/sgl-model-gateway/src/policies/cache_aware.rs",
        baseline=SglangCacheAware,
    ),
    Rule(
        name="aibrix_prefix_cache",
        summary="the rule `prefix-cache` of AIBrix, from what it has sent",
        source="https://pkg.go.dev/github.com/vllm-project/aibrix/pkg/plugins/gateway/algorithms",
        baseline=AibrixPrefixCache,
    ),
)
