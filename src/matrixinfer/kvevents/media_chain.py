"""A chain of blocks in which media begin, from its root on: what an engine made of a prompt with media."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from matrixinfer.blocks import Medium
from matrixinfer.kvevents.forest import Forest
from matrixinfer.kvevents.run import Run

_MOST_RUNS = 1_000


class MediaChain(NamedTuple):
    """The tokens of a chain, and the media that begin among them."""

    model: str
    seed: int | None
    """The salt's hash; None for no salt."""
    tokens: bytes
    """In the form of `token_bytes`."""
    media: Sequence[Medium]
    block_size: int
    """Tokens of the engine's blocks."""


See: TypeAlias = Callable[[MediaChain], None]


def chain_of(forest: Forest, run: Run) -> MediaChain | None:
    """The chain that ends with a run; None where a part of it is not there."""
    parts, media, at = [bytes(run.tokens)], list(run.media), run
    base = run.base
    for _ in range(_MOST_RUNS):
        if at.parent is None:
            return MediaChain(run.model, at.seed, b"".join(reversed(parts)), media, run.block_size)
        above = forest.run_of(at.parent)
        if above is None:
            return None
        parts.append(bytes(above.tokens[: (base - above.base) * 4]))
        media = [medium for medium in above.media if medium[0] < base] + media
        at, base = above, above.base
    return None
