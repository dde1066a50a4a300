"""What a request asks for before it is sent, and what an engine reports that it has used."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import msgspec

from matrixinfer.errors import UNREADABLE

ASSUMED_OUTPUT_TOKENS = 512
"""What a request that does not bound its answer is taken to generate, until the engine reports it."""
INLINE_BYTES = 256 * 1024
"""Longer bodies are searched in a thread."""


class Demand(NamedTuple):
    """What a request asks for, as far as it is known before it is sent."""

    input_tokens: int
    cached_tokens: int
    """Of these, what the endpoint that holds most of the prompt is predicted to find in its cache."""
    generates: bool
    """Whether the engine generates text, and not only reads the prompt."""
    body: bytes

    async def output_tokens(self) -> int:
        """The most that the engine may generate, according to the request."""
        if not self.generates:
            return 0
        if len(self.body) <= INLINE_BYTES:
            return _output_tokens(self.body)
        return await asyncio.to_thread(_output_tokens, self.body)


class Used(NamedTuple):
    """What an engine reports."""

    input_tokens: int
    cached_tokens: int | None
    output_tokens: int | None
    """None if nothing is generated, as for embeddings."""

    @property
    def computed(self) -> int:
        """Tokens that the engine has computed or generated."""
        return max(0, self.input_tokens - (self.cached_tokens or 0)) + (self.output_tokens or 0)


class _Bounds(msgspec.Struct):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    n: int | None = None


_BOUNDS = msgspec.json.Decoder(_Bounds)


def _output_tokens(body: bytes) -> int:
    """The most that a request may generate, by its own word."""
    try:
        bounds = _BOUNDS.decode(body)
    except UNREADABLE:
        return ASSUMED_OUTPUT_TOKENS
    given = bounds.max_completion_tokens or bounds.max_output_tokens or bounds.max_tokens
    return max(1, ASSUMED_OUTPUT_TOKENS if given is None else given) * max(1, bounds.n or 1)
