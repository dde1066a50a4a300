"""A decision in one row. Pure."""

from __future__ import annotations

import msgspec

from matrixinfer.routing.decision_log import Record
from matrixinfer.routing.reasons import reason
from matrixinfer.scheduler.framework import Trust


class DecisionRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the list of decisions; `/debug/decisions?id=…` has the rest."""

    id: str
    at: float
    model: str
    tokens: int | None
    pod: str
    trust: Trust
    predicted_hit_tokens: int | None
    """None if the request was sent to another pod than the chosen one."""
    cached_tokens: int | None
    status: int | None
    ttft_ms: float | None
    is_over: bool
    reason: str
    degraded: bool
    """Whether the decision had to do without an input, such as token ids."""


def row(record: Record) -> DecisionRow:
    """One decision."""
    pod = record.attempts[-1]
    chosen = record.kept[0]
    there = next((each for each in record.kept if each.name == pod), None)
    return DecisionRow(
        id=record.id,
        at=round(record.at, 3),
        model=record.model,
        tokens=record.prompt_tokens,
        pod=pod,
        trust=chosen.trust if there is None else there.trust,
        predicted_hit_tokens=chosen.predicted_hit(record.prompt_tokens, record.block_size)
        if pod == chosen.name
        else None,
        cached_tokens=record.cached,
        status=record.status,
        ttft_ms=None if record.ttft_ms is None else round(record.ttft_ms, 1),
        is_over=record.is_over,
        reason=reason(record),
        degraded=bool(record.notes),
    )
