"""Why a request went where it did, in a few words. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matrixinfer.scheduler.framework import Candidate

if TYPE_CHECKING:
    from matrixinfer.routing.decision_log import Record


def reason(record: Record) -> str:
    """The reason that the scores and filters show. It names facts: which of them tipped the balance, scores say."""
    chosen = record.kept[0]
    if len(record.attempts) > 1:
        return f"{record.attempts[-2]} failed or refused it"
    if record.pods == 1:
        return "the only pod of this model"
    best = max(record.kept, key=lambda each: each.credit)
    if not best.credit:
        return "no pod is known to hold any of it; the other scores decide"
    if best.credit == chosen.credit:
        return f"holds the most of it: {_blocks(chosen)} of {_of(record)}"
    held = f"{best.name} holds more ({_blocks(best)} of {_of(record)})"
    filtered = record.filtered.get(best.name)
    if filtered is not None:
        return f"{held}, but is left out: {filtered}"
    return f"{held}, but {'is busier' if best.load > chosen.load else 'scores lower'}"


def _blocks(candidate: Candidate) -> str:
    return f"{candidate.credit:.0f}" if candidate.credit >= 1 else f"{candidate.credit:.1f}"


def _of(record: Record) -> str:
    return "1 block" if record.blocks == 1 else f"{record.blocks} blocks"
