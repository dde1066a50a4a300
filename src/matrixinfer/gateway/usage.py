"""Reads the usage report at the end of an answer: how many prompt tokens the engine counted and found in its cache.

Every API puts `usage` at the end of an answer, or of a stream that has it. JSON escapes every quote within text, so the
bytes that start the report cannot be part of generated text.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from typing import Annotated

import msgspec

from matrixinfer.errors import UNREADABLE

_TAIL_BYTES = 16 * 1024
_REPORT = re.compile(rb'"usage":\s*(\{(?:[^{}]|\{[^{}]*\})*\})')


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens that the engine reports."""

    prompt: int
    cached: int | None
    """Tokens that it found in its cache; None if it does not say. vLLM leaves out a count of 0."""
    output: int | None = None
    """Tokens that it generated; None if it does not say."""


_NO_CHOICES = re.compile(rb'"choices":\s*\[\s*\]')
_EVENT_END = re.compile(rb"(?:\r\n|\n|\r(?!\n|\Z)){2}|\r\r\Z")
"""An empty line. Lines end in LF, CRLF or CR; a CR at the end of the bytes at hand may be half a CRLF."""


_MOST_TOKENS = 2**31 - 1
"""No request has more. A larger count is not believed: it would use up the limits of the caller."""
_Tokens = Annotated[int, msgspec.Meta(ge=0, le=_MOST_TOKENS)]


class _Details(msgspec.Struct):
    cached_tokens: _Tokens | None = None


class _Report(msgspec.Struct):
    """The fields of OpenAI's completions and responses, and of Anthropic's messages, which count cached tokens apart."""

    prompt_tokens: _Tokens | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens: _Tokens | None = None
    input_tokens: _Tokens | None = None
    output_tokens: _Tokens | None = None
    input_tokens_details: _Details | None = None
    cache_read_input_tokens: _Tokens | None = None
    cache_creation_input_tokens: _Tokens | None = None


_DECODER = msgspec.json.Decoder(_Report)


class Tail:
    """The last bytes of a stream: what a usage report needs, and at most one chunk more."""

    __slots__ = ("_bytes", "_chunks")

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self._bytes = 0

    def add(self, chunk: bytes) -> None:
        """Add the next chunk."""
        self._chunks.append(chunk)
        self._bytes += len(chunk)
        while self._bytes - len(self._chunks[0]) >= _TAIL_BYTES:
            self._bytes -= len(self._chunks.popleft())

    def __bytes__(self) -> bytes:
        return b"".join(self._chunks)


class UsageStripper:
    """Removes the event that only reports usage from a stream of server-sent events.

    Everything else passes on as it comes, except that the beginning of an event waits for its end: engines send events
    whole. Lines may end in LF or CRLF.
    """

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = b""

    def change(self, chunk: bytes) -> bytes:
        """The bytes that can be passed on so far, possibly none."""
        data = self._held + chunk
        passed, start = [], 0
        for end in _EVENT_END.finditer(data):
            event = data[start : end.end()]
            start = end.end()
            if not _reports_only_usage(event):
                passed.append(event)
        self._held = data[start:]
        if len(self._held) > _TAIL_BYTES:  # no usage report is this long
            passed.append(self.rest())
        return b"".join(passed)

    def rest(self) -> bytes:
        """The bytes left at the end of the stream."""
        held, self._held = self._held, b""
        return b"" if _reports_only_usage(held) else held


def _reports_only_usage(event: bytes) -> bool:
    return _REPORT.search(event) is not None and _NO_CHOICES.search(event) is not None


def usage(answer: bytes) -> Usage | None:
    """The last usage report in `answer`, which may be the tail of one; None if there is no readable report."""
    tail = answer[-_TAIL_BYTES:]
    found = None
    for each in _REPORT.finditer(tail):
        found = each
    if found is None:
        return None
    try:
        report = _DECODER.decode(found[1])
    except UNREADABLE:
        return None
    if report.prompt_tokens is not None:
        details = report.prompt_tokens_details
        cached = None if details is None else details.cached_tokens
        return Usage(prompt=report.prompt_tokens, cached=cached, output=report.completion_tokens)
    if report.input_tokens is None:
        return None
    details, read = report.input_tokens_details, report.cache_read_input_tokens
    if details is not None:
        return Usage(prompt=report.input_tokens, cached=details.cached_tokens, output=report.output_tokens)
    prompt = report.input_tokens + (read or 0) + (report.cache_creation_input_tokens or 0)
    return Usage(prompt=prompt, cached=read, output=report.output_tokens)
