"""What block hashes are made of: token ids, salts and media."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import sha256
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

TokenIds: TypeAlias = npt.NDArray[np.uint32]
"""Token ids: shape (n,), one unsigned 32-bit id per token."""

Medium: TypeAlias = tuple[int, str]
"""Where an image, audio or video begins, in tokens, and the engine's name of its content."""

TOP_BIT_CLEARED = (1 << 63) - 1


ROOT = int.from_bytes(sha256(b"root\0").digest()[:8], "big") & TOP_BIT_CLEARED
"""Stands for the block before the first one, where a prompt has no salt."""


def salt_parent(salt: str) -> int:
    """The parent hash of block 0 for a cache salt, so that prompts share blocks only with prompts of the same salt."""
    return int.from_bytes(sha256(b"salt\0" + salt.encode()).digest()[:8], "big") & TOP_BIT_CLEARED


def media_parent(parent: int | None, media: Sequence[Medium]) -> int:
    """What a block follows in which `media` begin. They are counted from the block's first token, in ascending order.

    The blocks behind it follow it, so each depends on all media that begin before its end.
    """
    state = sha256(b"media\0" + (ROOT if parent is None else parent).to_bytes(8, "big"))
    for start, name in media:
        data = name.encode("utf-8", "surrogatepass")
        state.update(start.to_bytes(4, "big") + len(data).to_bytes(4, "big") + data)
    return int.from_bytes(state.digest()[:8], "big") & TOP_BIT_CLEARED


def media_in(media: Sequence[Medium], first: int, last: int) -> list[Medium]:
    """Those of `media` that begin at the tokens [first, last), counted from `first`."""
    return [(start - first, name) for start, name in media if first <= start < last]


def token_bytes(tokens: TokenIds | Sequence[int]) -> bytes:
    """The bytes that are hashed for token ids: four bytes per id, big-endian.

    Raises `OverflowError` for ids outside the range of an unsigned 32-bit integer, and `TypeError` for other types and
    for arrays that are not uint32 or not of one dimension.
    """
    if not isinstance(tokens, np.ndarray):
        if isinstance(tokens, bytes | bytearray | memoryview):  # `array` would read them as machine integers
            raise TypeError(f"expected a sequence of integers, got {type(tokens).__name__}")
        tokens = np.array(array("I", tokens))  # checks each id, three times as fast as numpy
    elif tokens.dtype != np.uint32:
        raise TypeError(f"expected an array of uint32, got {tokens.dtype}")
    elif tokens.ndim != 1:
        raise TypeError(f"expected an array of shape (n,), got {tokens.shape}")
    return tokens.astype(">u4").tobytes()
