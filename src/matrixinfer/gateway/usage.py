"""How many prompt tokens an engine says it has counted, read from the end of its answer.

Every API reports `usage` as the last thing of an answer, or of a stream that has it. Within JSON text every quote is
escaped, so the bytes that begin the report cannot be part of generated text.
"""

from __future__ import annotations

import re
from collections import deque

import msgspec

_TAIL_BYTES = 16 * 1024
_REPORT = re.compile(rb'"usage":\s*(\{(?:[^{}]|\{[^{}]*\})*\})')


class _Usage(msgspec.Struct):
    """OpenAI's fields, those of its responses, and Anthropic's, which count cached tokens apart."""

    prompt_tokens: int | None = None
    input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


_USAGE = msgspec.json.Decoder(_Usage)


class Tail:
    """The last bytes of a stream of chunks, at most a chunk more than needed."""

    __slots__ = ("_bytes", "_chunks")

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self._bytes = 0

    def add(self, chunk: bytes) -> None:
        """The next chunk."""
        self._chunks.append(chunk)
        self._bytes += len(chunk)
        while self._bytes - len(self._chunks[0]) >= _TAIL_BYTES:
            self._bytes -= len(self._chunks.popleft())

    def __bytes__(self) -> bytes:
        return b"".join(self._chunks)


def prompt_tokens(answer: bytes) -> int | None:
    """The count in the last report of `answer`, or of the end of it; None when there is none that can be read."""
    tail = answer[-_TAIL_BYTES:]
    report = None
    for found in _REPORT.finditer(tail):
        report = found
    if report is None:
        return None
    try:
        usage = _USAGE.decode(report[1])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if usage.prompt_tokens is not None or usage.input_tokens is None:
        return usage.prompt_tokens
    return usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
