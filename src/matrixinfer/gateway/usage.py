"""How many prompt tokens an engine says it has counted and found in its cache, read from the end of its answer.

Every API reports `usage` as the last thing of an answer, or of a stream that has it. Within JSON text every quote is
escaped, so the bytes that begin the report cannot be part of generated text.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass

import msgspec

_TAIL_BYTES = 16 * 1024
_REPORT = re.compile(rb'"usage":\s*(\{(?:[^{}]|\{[^{}]*\})*\})')


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Prompt tokens, as the engine counts them."""

    prompt: int
    cached: int | None
    """Those that it found in its cache; None where it does not tell. vLLM leaves out a count of 0."""


_NO_CHOICES = re.compile(rb'"choices":\s*\[\s*\]')
_EVENT_END = re.compile(rb"\r?\n\r?\n")


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Report(msgspec.Struct):
    """OpenAI's fields, those of its responses, and Anthropic's, which count cached tokens apart."""

    prompt_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens: int | None = None
    input_tokens_details: _Details | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


_DECODER = msgspec.json.Decoder(_Report)


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


class Stripper:
    """Takes the chunk that only reports usage out of a stream of server-sent events.

    What comes is passed on as it comes, but for an event's beginning, which waits for its end: engines send them whole.
    Lines may end in LF or CRLF.
    """

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = b""

    def strip(self, chunk: bytes) -> bytes:
        """What can be passed on of the bytes so far; it may be nothing."""
        data = self._held + chunk
        passed, start = [], 0
        for end in _EVENT_END.finditer(data):
            event = data[start : end.end()]
            start = end.end()
            if not _reports_only_usage(event):
                passed.append(event)
        self._held = data[start:]
        if len(self._held) > _TAIL_BYTES:  # no event that reports usage is so long
            passed.append(self.rest())
        return b"".join(passed)

    def rest(self) -> bytes:
        """What is left at the stream's end."""
        held, self._held = self._held, b""
        return b"" if _reports_only_usage(held) else held


def _reports_only_usage(event: bytes) -> bool:
    return _REPORT.search(event) is not None and _NO_CHOICES.search(event) is not None


def usage(answer: bytes) -> Usage | None:
    """What the last report of `answer`, or of the end of it, says; None when there is none that can be read."""
    tail = answer[-_TAIL_BYTES:]
    found = None
    for each in _REPORT.finditer(tail):
        found = each
    if found is None:
        return None
    try:
        report = _DECODER.decode(found[1])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if report.prompt_tokens is not None:
        details = report.prompt_tokens_details
        return Usage(prompt=report.prompt_tokens, cached=None if details is None else details.cached_tokens)
    if report.input_tokens is None:
        return None
    details, read = report.input_tokens_details, report.cache_read_input_tokens
    if details is not None:
        return Usage(prompt=report.input_tokens, cached=details.cached_tokens)
    return Usage(prompt=report.input_tokens + (read or 0) + (report.cache_creation_input_tokens or 0), cached=read)
