"""What a prepared request asks for, for those who decide whether it may have it."""

from __future__ import annotations

from matrixinfer.access.demand import Demand
from matrixinfer.prompt.anthropic import COUNT_PATH, MESSAGES_PATH
from matrixinfer.prompt.openai import CHAT_PATH, COMPLETIONS_PATH
from matrixinfer.prompt.responses import RESPONSES_PATH
from matrixinfer.routing.prepared import Prepared

_GENERATING = frozenset((CHAT_PATH, COMPLETIONS_PATH, RESPONSES_PATH, MESSAGES_PATH))


def demand_of(prepared: Prepared) -> Demand:
    """The request's tokens, and how many of them the endpoint that holds most of the prompt should find in its cache."""
    request, path = prepared.request, prepared.prompt.path
    if path == COUNT_PATH:  # which computes nothing
        return Demand(0, 0, generates=False, body=prepared.body)
    held = 0
    if prepared.matches is not None and not prepared.is_approximate and request.prompt_tokens:
        most = max(prepared.matches.blocks.values(), default=0) * request.block_size
        held = min(most, request.prompt_tokens - 1)
    tokens = request.whole_tokens + request.other_tokens
    return Demand(tokens, held, generates=path in _GENERATING, body=prepared.body)
