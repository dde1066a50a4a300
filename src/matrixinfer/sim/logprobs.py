"""Made-up log-probabilities, in the shapes of OpenAI's chats and completions."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any


def chat_logprobs(pieces: Sequence[str], top: int, _: int) -> dict[str, Any]:
    """Of a chat's tokens, with `top` alternatives each."""
    return {"content": [{**_token(piece, 0), "top_logprobs": _others(piece, top)} for piece in pieces]}


def completion_logprobs(pieces: Sequence[str], top: int, offset: int) -> dict[str, Any]:
    """Of a completion's tokens, which begin at this offset of the text."""
    offsets = [offset + len("".join(pieces[:i])) for i in range(len(pieces))]
    return {
        "text_offset": offsets,
        "token_logprobs": [_logprob(piece, 0) for piece in pieces],
        "tokens": list(pieces),
        "top_logprobs": [{each["token"]: each["logprob"] for each in _others(piece, top)} for piece in pieces],
    }


def _token(piece: str, rank: int) -> dict[str, Any]:
    text = piece if rank == 0 else f"{piece}~{rank}"
    return {"token": text, "logprob": _logprob(piece, rank), "bytes": list(text.encode())}


def _others(piece: str, top: int) -> list[dict[str, Any]]:
    return [_token(piece, rank) for rank in range(top)]


def _logprob(piece: str, rank: int) -> float:
    return -(zlib.crc32(piece.encode()) % 1000 + 1) / 1000 - rank
