"""The last decisions, kept to explain why a request went where it did. No prompts, no token ids."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Protocol, TypeVar

import msgspec

from matrixinfer.routing.reasons import reason
from matrixinfer.scheduler.framework import Candidate, Decision, SchedulingRequest

T = TypeVar("T")
PODS_KEPT = 16
"""A record keeps at most this many candidates: the best ones, then filtered ones."""


class Record(msgspec.Struct, kw_only=True, eq=False):
    """One decision and its outcome."""

    id: str
    at: float
    """Unix time in seconds."""
    path: str
    model: str
    prompt_tokens: int | None
    unknown_tokens: int
    """Estimated tokens of the prompt whose ids are unknown."""
    other_tokens: int
    """Estimated tokens of the request's other prompts."""
    block_size: int
    blocks: int
    """Full blocks of the prompt."""
    chunks: int
    """Chunks of its bytes, if it was looked up by them."""
    pods: int
    """Number of candidates."""
    kept: Sequence[Candidate]
    """Best first."""
    scores: Mapping[str, Mapping[str, float]]
    """Scorer name to endpoint to score, before weights."""
    totals: Mapping[str, float]
    expected_ms: Mapping[str, float]
    """Endpoint to the milliseconds that a scorer expects until its answer begins, with what the request costs others."""
    filtered: Mapping[str, str]
    limits: Mapping[str, Sequence[str]]
    """What the events of endpoints that are not `exact` cannot tell, in words."""
    notes: Sequence[str]
    timings_ms: Mapping[str, float]
    attempts: list[str]
    """Endpoints that the request was sent to, in order."""
    status: int | None = None
    """Status of the answer; None until there is one."""
    counted: int | None = None
    """Prompt tokens that the engine counted; None if it does not report them."""
    cached: int | None = None
    """Prompt tokens that it found in its cache; None if it does not report them."""
    late: Mapping[str, int | None] | None = None
    """What the token ids showed that came after the decision."""
    ttft_ms: float | None = None
    """Milliseconds from the request to the first byte of its answer; None until there is one."""
    is_over: bool = False
    """Whether the answer is over, however it ended."""
    sent_ids: bool = False
    """Whether the endpoint got the prompt's token ids with the request."""

    def learned(self, request: SchedulingRequest, here: Candidate | None) -> None:
        """The token ids have come after the decision. `here` is the endpoint if its hit can still be predicted."""
        predicted = None if here is None else here.predicted_hit(request.prompt_tokens, request.block_size)
        self.late = {
            "tokens": request.prompt_tokens,
            "blocks": len(request.chain),
            "predicted_hit_tokens": predicted,
        }

    def moved(self, endpoint: str) -> None:
        """The request was sent to another endpoint."""
        self.attempts.append(endpoint)

    def answered(self, status: int) -> None:
        """The endpoint has answered with this status."""
        self.status = status

    def failed(self) -> None:
        """The endpoint sent no answer, or only its headers, which the client has not got."""
        self.status = None

    def first_byte(self, seconds: float) -> None:
        """The first byte of the answer came, `seconds` after its request."""
        self.ttft_ms = seconds * 1000

    def usage(self, prompt_tokens: int, cached_tokens: int | None) -> None:
        """The answer reports the prompt's tokens, and how many of them were cached if it says so."""
        self.counted, self.cached = prompt_tokens, cached_tokens

    def view(self) -> dict[str, object]:
        """As JSON-able data."""
        chosen = self.kept[0]
        return {
            "id": self.id,
            "at": self.at,
            "path": self.path,
            "model": self.model,
            "tokens": self.prompt_tokens,
            "unknown_tokens": self.unknown_tokens,
            "other_tokens": self.other_tokens,
            "blocks": self.blocks,
            "chunks": self.chunks,
            "chosen": chosen.name,
            "reason": reason(self),
            "ranked": [candidate.name for candidate in self.kept if candidate.name not in self.filtered],
            "predicted_hit_tokens": self._predicted(chosen),
            "late": self.late,
            "guessed_hit_tokens": chosen.guessed_tokens,
            "reported": {
                "attempts": list(self.attempts),
                "sent_ids": self.sent_ids,
                "status": self.status,
                "prompt_tokens": self.counted,
                "cached_tokens": self.cached,
            },
            "ttft_ms": _rounded(self.ttft_ms, 1),
            "is_over": self.is_over,
            "candidates": self.pods,
            "pods": {candidate.name: self._pod(candidate) for candidate in self.kept},
            "notes": list(self.notes),
            "timings_ms": {stage: round(milliseconds, 4) for stage, milliseconds in self.timings_ms.items()},
        }

    def _predicted(self, candidate: Candidate) -> int:
        return candidate.predicted_hit(self.prompt_tokens, self.block_size)

    def _pod(self, candidate: Candidate) -> dict[str, object]:
        name = candidate.name
        return {
            "trust": candidate.trust,
            "feed": candidate.feed,
            "limits": list(self.limits.get(name, ())),
            "matched_blocks": candidate.matched_blocks,
            "tiers": list(candidate.tiers),
            "pending_blocks": candidate.pending_blocks,
            "recent_blocks": candidate.recent_blocks,
            "recent_chunks": candidate.recent_chunks,
            "credit": round(candidate.credit, 2),
            "filtered": self.filtered.get(name),
            "scores": {scorer: scores.get(name) for scorer, scores in self.scores.items()},
            "total": self.totals.get(name),
            "predicted_hit_tokens": self._predicted(candidate),
            "guessed_hit_tokens": candidate.guessed_tokens,
            "reuse": round(candidate.reuse, 3),
            "in_flight": candidate.in_flight,
            "peers_in_flight": candidate.peers_in_flight,
            "foreign": candidate.foreign,
            "unseen_tokens": round(candidate.unseen_tokens),
            "running": candidate.running,
            "waiting": candidate.waiting,
            "metrics_age_s": _rounded(candidate.metrics_age, 3),
            "queued_tokens": candidate.queued_tokens,
            "queue_ms": None if candidate.queue_seconds is None else round(candidate.queue_seconds * 1e3, 1),
            "prefill_tokens_per_second": _rounded(candidate.condition.prefill_rate, 1),
            "held_tokens": candidate.condition.held_tokens,
            "cache_tokens": candidate.condition.cache_tokens,
            "evicted_tokens_per_second": round(candidate.condition.evicted_per_second, 1),
            "expected_ms": _rounded(self.expected_ms.get(name), 1),
        }


def record(
    decision: Decision,
    path: str,
    notes: Sequence[str],
    timings_ms: Mapping[str, float],
    *,
    pods: int | None = PODS_KEPT,
    limits_of: Callable[[str], Sequence[str]] = lambda _: (),
) -> Record:
    """Keep a decision with its first `pods` candidates; None keeps all of them.

    `limits_of` says why the cache of an endpoint is not known exactly.
    """
    request = decision.request
    removed = (candidate for candidate in decision.candidates if candidate.name in decision.filtered)
    kept = tuple(islice(chain(decision.ranked, removed), pods))
    names = [candidate.name for candidate in kept]
    keeps_all = len(kept) == len(decision.candidates)
    return Record(
        id=request.id,
        at=time.time(),
        path=path,
        model=request.model,
        prompt_tokens=request.prompt_tokens,
        unknown_tokens=request.unknown_tokens,
        other_tokens=request.other_tokens,
        block_size=request.block_size,
        blocks=len(request.chain),
        chunks=len(request.chunks),
        pods=len(decision.candidates),
        kept=kept,
        scores=decision.scores
        if keeps_all
        else {scorer: _of(scores, names) for scorer, scores in decision.scores.items()},
        totals=decision.totals if keeps_all else _of(decision.totals, names),
        expected_ms=decision.expected_ms if keeps_all else _of(decision.expected_ms, names),
        filtered=decision.filtered if keeps_all else _of(decision.filtered, names),
        limits={each.name: limits_of(each.name) for each in kept if each.trust != "exact"},
        notes=(*notes, *decision.notes),
        timings_ms={**timings_ms, **decision.timings_ms},
        attempts=[decision.chosen.name],
    )


def _of(values: Mapping[str, T], names: Sequence[str]) -> dict[str, T]:
    return {name: values[name] for name in names if name in values}


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


class DecisionWatch(Protocol):
    """Sees decisions as they are made and as their requests end. It must be quick: every request waits for it."""

    def decided(self, record: Record, decision: Decision) -> None:
        """A request goes to `decision.chosen`."""
        ...

    def ended(self, record: Record) -> None:
        """Its answer is over, however it ended."""
        ...

    def forget(self, endpoint: str) -> None:
        """An endpoint has gone."""
        ...


class DecisionLog:
    """The last `size` records, newest last."""

    def __init__(self, size: int) -> None:
        self._records: deque[Record] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: Record) -> None:
        """Keep a record, dropping the oldest if the log is full."""
        self._records.append(record)

    def newest(self, *, request_id: str | None = None, pod: str | None = None) -> Iterator[Record]:
        """Newest first: all, those of one request, or those that went to one pod."""
        for each in reversed(self._records):
            if (request_id is None or each.id == request_id) and (pod is None or each.attempts[-1] == pod):
                yield each
