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


See: TypeAlias = Callable[[MediaChain], None]


def chain_of(forest: Forest, run: Run, last: int) -> MediaChain | None:
    """The chain that ends with the block at position `last` of a run; None where a part is not there, or has no media."""
    parts: list[tuple[Run, int]] = []  # from the end on: runs, and where their parts end
    at, end, has_media = run, run.end(last), False
    for _ in range(_MOST_RUNS):
        parts.append((at, end))
        has_media = has_media or bool(at.media)
        if at.parent is None:
            return _joined(parts[::-1]) if has_media else None
        end = at.base
        above = forest.run_of(at.parent)
        if above is None:
            return None
        at = above
    return None


def _joined(parts: Sequence[tuple[Run, int]]) -> MediaChain | None:
    root, _ = parts[0]
    tokens = b"".join(run.tokens.part(0, end - run.base) for run, end in parts)
    media = [medium for run, end in parts for medium in run.media if medium[0] < end]
    return MediaChain(root.model, root.seed, tokens, media) if media else None
