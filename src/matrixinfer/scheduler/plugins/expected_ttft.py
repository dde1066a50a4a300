"""`expected-ttft`: prefers pods whose answer begins soonest, as estimated in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, ClassVar

from msgspec import Meta

from matrixinfer.config import Count, Section, described
from matrixinfer.scheduler.framework import Candidate, Condition, Plugin, SchedulingRequest, Scores, Services
from matrixinfer.scheduler.match_notes import match_note
from matrixinfer.scheduler.plugins.bounded_load import bound
from matrixinfer.scheduler.prefill import ATTENTION_TOKENS

_UNKNOWN_RATE = 8_000.0
"""Tokens per second where nobody measures it; only the scale of the estimate depends on it, not its order."""
_LEAST_REUSE = 0.3
"""The share of what a cache evicts that is needed again, however long it keeps blocks: an estimate has no certainty."""
_ROOM_FOR_COPIES = 4
"""From so many pods on the wait share counts in full. The fewer they are, the more room in caches a copy takes."""
_TIE_MS = 1.0
"""What a full cache costs against an empty one, so that equal pods are told apart by their footprints."""


class ExpectedTtft(Plugin):
    """Scores by the estimated time to the first token, and by what the request costs the others at that pod.

    `expected = queue + prefill + decode + eviction + delay of others`, in milliseconds. The queue is what the requests in
    flight there still have to compute, and what other gateways have probably sent there unheard; prefill is the part of this prompt that is not cached; both at the rate that the
    pod's answers have shown. Each request in flight counts as `requestTokens` more. Tokens that the prompt pushes out of a
    full cache count by how likely they are needed again: one half if the cache keeps a block for `reuseSeconds`, more if it
    keeps it for a shorter time, and never less than three tenths. A pod with room evicts nothing.

    Requests in flight stand for those that will come to the same pod: the next turns of their conversations, and others
    with their prefixes. Each of them waits for what is computed there, so for each request in flight the prefill counts
    again by `stallShare`, and the queue by `waitShare`. Others come to an idle pod, too: at each pod the prefill counts
    again for the mean number of requests in flight, so that a warm conversation is not computed again wherever it is quiet.

    So a hit is worth a wait, but only as long as computing it elsewhere takes: when the queue before a hot prefix is longer
    than that, the prefix is computed at a second pod, and both serve it from then on. `waitShare` counts half
    with two pods, and three quarters with three: there a copy takes the room of more else.

    `score = 100 − 50 × excess / scaleMs` while the excess over the least expected time is up to `scaleMs`, so that
    differences in milliseconds stay what they are in the sum with other scorers; beyond that it approaches 0.

    As a filter, it removes pods that would have more than `loadFactor` times their fair share of all requests, if those are
    more than `minLoad`: a hit on a very long prefix must not draw every request to one pod, however long it takes to
    compute elsewhere.
    """

    name: ClassVar[str] = "expected-ttft"

    class Args(Section, frozen=True):
        """What requests cost besides their prompts, and the scale of the score."""

        request_tokens: Annotated[
            int,
            Meta(ge=0),
            described("How much one request at a pod costs a new one while it decodes, in tokens of prefill."),
        ] = 128
        stall_share: Annotated[
            float,
            Meta(ge=0, le=10),
            described(
                "How much the prefill counts again for each request in flight at the pod, and for their mean over all "
                "pods, which it delays. 0 ignores them."
            ),
        ] = 1.0
        wait_share: Annotated[
            float,
            Meta(ge=0, le=10),
            described(
                "How much the queue counts again for each request in flight at the pod. More computes a hot prefix at "
                "further pods earlier. Half of it counts with two pods, all of it from four on."
            ),
        ] = 0.5
        reuse_seconds: Annotated[
            float,
            Meta(gt=0, le=86_400),
            described("A cache that keeps blocks for this long loses half of what it evicts to requests that need it."),
        ] = 60.0
        load_factor: Annotated[
            float,
            Meta(ge=1, le=1000),
            described("The most requests that a pod may have, in multiples of its fair share."),
        ] = 1.5
        min_load: Annotated[Count, described("Requests that a pod may always have.")] = 16
        scale_ms: Annotated[
            Count, described("Milliseconds above the least expected time at which the score is 50.")
        ] = 10_000

    def __init__(self, args: Args, services: Services) -> None:
        self._request_tokens = args.request_tokens
        self._stall_share = args.stall_share
        self._wait_share = args.wait_share
        self._reuse_seconds = args.reuse_seconds
        self._load_factor = Fraction(str(args.load_factor))
        self._min_load = args.min_load
        self._scale = float(args.scale_ms)

    def filter(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[str | None]:
        loads = [pod.load for pod in candidates]
        if max(loads, default=0) < self._min_load:
            return [None] * len(loads)
        limit = bound(sum(loads), len(loads), factor=self._load_factor, min_in_flight=self._min_load)
        return [f"{n + 1} requests with this one, the bound is {limit}" if n >= limit else None for n in loads]

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Scores:
        costs = self._milliseconds(request, candidates)
        least, scale = min(costs, default=0.0), self._scale
        values = [
            100.0 - 50.0 * (cost - least) / scale if cost - least <= scale else 50.0 * scale / (cost - least)
            for cost in costs
        ]
        return Scores(values=values, note=match_note(request, candidates), expected_ms=costs)

    def _milliseconds(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> list[float]:
        """What the request costs at each pod. One loop, because there may be hundreds of them."""
        prompt, others, size = request.whole_tokens, request.other_tokens, request.block_size
        per_request, stall, costs = self._request_tokens, self._stall_share, list[float]()
        wait = self._wait_share * min(1.0, len(candidates) / _ROOM_FOR_COPIES)
        whole, attention = prompt + others, 1.0 / ATTENTION_TOKENS
        loads = [pod.load if pod.foreign is None else pod.in_flight + pod.foreign for pod in candidates]
        later = 1.0 + stall * sum(loads) / max(1, len(loads))
        cold = whole * (1.0 + (whole - 0.5 * whole) * attention)
        for pod, load in zip(candidates, loads, strict=True):
            cache, queue = pod.condition, pod.queue_seconds
            rate = (cache.prefill_rate or _UNKNOWN_RATE) / 1e3  # tokens per millisecond
            uncached: float = whole
            work = cold
            if pod.matched_blocks or pod.pending_blocks or pod.cached_credit:
                missing = prompt - pod.credit * size
                uncached = others + missing if missing > 0.0 else others
                # `prefill_work`, without a call
                work = uncached * (1.0 + (whole - 0.5 * uncached) * attention)
            prefill = work / rate
            waiting = pod.queued_tokens / rate if queue is None else queue * 1e3
            if pod.unseen_tokens:
                waiting += pod.unseen_tokens / rate
            cost = waiting + prefill * later
            if load:
                cost += load * (per_request / rate + prefill * stall + waiting * wait)
                if pod.foreign and pod.waiting:
                    cost += min(pod.waiting, pod.foreign) * per_request / rate
            held, most = cache.held_tokens, cache.cache_tokens
            if held and most:
                cost += _TIE_MS * held / most
                if uncached > most - held:
                    cost += self._evicted(cache, uncached) / rate
            costs.append(cost)
        return costs

    def _evicted(self, cache: Condition, tokens: float) -> float:
        """Tokens that must be computed again because `tokens` new ones push them out."""
        held = cache.held_tokens or 0
        evicted = min(tokens - ((cache.cache_tokens or 0) - held), held)
        kept_seconds = held / cache.evicted_per_second if cache.evicted_per_second > 0.0 else float("inf")
        return evicted * max(_LEAST_REUSE, 1.0 / (1.0 + kept_seconds / self._reuse_seconds))
