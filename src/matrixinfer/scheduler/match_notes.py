"""What a decision had to do without when it looked for the prompt in caches, in words for people."""

from __future__ import annotations

from collections.abc import Sequence

from matrixinfer.scheduler.framework import Candidate, SchedulingRequest


def match_note(request: SchedulingRequest, candidates: Sequence[Candidate]) -> str | None:
    """Say why the prompt cannot be found, or where the index is in doubt; None if neither is so."""
    if not request.chain and (not request.unknown_tokens or request.whole_tokens < request.block_size):
        return why_no_blocks(request)
    if is_too_short(request, candidates):
        return too_short(request)
    return what_is_unknown(candidates)


def too_short(request: SchedulingRequest) -> str:
    """Say that no engine can find the prompt."""
    return f"no engine can find the prompt's {request.whole_tokens} tokens in its cache: they fit into one block"


def what_is_unknown(candidates: Sequence[Candidate]) -> str | None:
    """Say of how many pods the index cannot say what they hold, or not for sure."""
    notes = []
    unknown = [pod.matched_blocks for pod in candidates].count(None)
    if unknown:
        notes.append(f"the index could not say what {unknown} of {len(candidates)} pods hold")
    trusts = [pod.trust for pod in candidates]
    for trust in ("partial", "stale"):
        if trust not in trusts:
            continue
        doubtful = sum(pod.matched_blocks is not None and pod.trust == trust for pod in candidates)
        if doubtful:
            notes.append(f"what the index says of {doubtful} of {len(candidates)} pods is {trust}")
    return "; ".join(notes) or None


def is_too_short(request: SchedulingRequest, candidates: Sequence[Candidate]) -> bool:
    """Whether no engine can have a hit: engines find only whole blocks, and never the last token."""
    tokens = request.whole_tokens
    if request.prompt_tokens is None:
        return False
    return all(pod.engine_block is not None and tokens <= pod.engine_block for pod in candidates)


def why_no_blocks(request: SchedulingRequest) -> str:
    """Say why the prompt has no block."""
    if request.unknown_tokens:
        return f"the prompt's tokens, estimated at {request.whole_tokens}, are fewer than one block of {request.block_size}"
    if request.prompt_tokens is None:
        return "the prompt was not tokenized"
    if request.prompt_tokens < request.block_size:
        return f"the prompt's {request.prompt_tokens} tokens are fewer than one block of {request.block_size}"
    return "the prompt has no block that an index could know"
