"""Puts one item in place of a chat's messages, so that what is around them is decoded without them.

Why that is exact: the messages are valid JSON, and are decoded by themselves. If a body with one item in their place is
valid, and has this very item in the field `messages` of its outermost object, then the whole body is valid, and has the
messages there. So where they are may be guessed: a wrong guess is noticed, and the body is decoded as a whole.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from msgspec import Raw

ITEM = b'"the messages before these"'
"""The item."""
LEAST_GUESSED = 32 * 1024
"""In shorter bodies, messages are found as fast by decoding."""
_BLANKS = b" \t\r\n"
_MESSAGES = re.compile(rb'"messages"[ \t\r\n]*:[ \t\r\n]*\[')
_LOOKED_AT = 16
"""How many bytes before a bracket are looked at to see which list it ends."""


class Span(NamedTuple):
    """Where the list of messages is in a body, its brackets included."""

    start: int
    stop: int

    @classmethod
    def guessed(cls, body: bytes) -> Span | None:
        """From the first key `messages` to the last bracket. None if that seems to end another list, or the body is short."""
        if len(body) < LEAST_GUESSED:
            return None
        found, stop = _MESSAGES.search(body), body.rfind(b"]")
        end = body[max(0, stop - _LOOKED_AT) : max(0, stop)].rstrip(_BLANKS)
        # A message ends with a text or a list. The schemas of tools end with objects, other lists do with something else.
        if found is None or not end.endswith((b'"}', b"]}")):
            return None
        return cls(found.end() - 1, stop + 1) if found.end() <= stop else None

    @classmethod
    def of(cls, messages: Raw, body: bytes) -> Span:
        """The span of `messages`, which was decoded from `body` and so is a view into it."""
        start = _address(messages) - _address(body)
        return cls(start, start + memoryview(messages).nbytes)

    def last_stop(self, body: bytes) -> int:
        """Where the last message ends; the list is not empty."""
        stop = self.stop - 1
        if body[stop - 1] in _BLANKS:
            return self.start + len(body[self.start : stop].rstrip(_BLANKS))
        return stop


def without_messages(body: bytes, span: Span) -> bytes | None:
    """The body with the item in place of all messages in this span. None if it has that item elsewhere, too."""
    head, tail = body[: span.start], body[span.stop :]
    return None if ITEM in head or ITEM in tail else b"%b[%b]%b" % (head, ITEM, tail)


def is_alone(messages: Raw) -> bool:
    """Whether the item is all of the decoded `messages`, so that the span of `without_messages` was right.

    They may be others: of equal keys, the last one counts, and what looks like a key may be part of a text.
    """
    return bytes(messages) == b"[%b]" % ITEM


def without_known(body: bytes, start: int, stop: int) -> bytes | None:
    """The body with the item in place of its first messages, whose list begins at `start`, and which end at `stop`.

    None if it has that item behind them, too.
    """
    rest = body[stop:]
    return None if ITEM in rest else b"%b[%b%b" % (body[:start], ITEM, rest)


def further(messages: Raw) -> bytes | None:
    """The JSON list of the messages behind the item, empty if there are none; `messages` are those of `without_known`.

    None if they are another list: of equal keys, the last one counts.
    """
    listed = bytes(messages)
    if not listed.startswith(b"[" + ITEM):
        return None
    rest = listed[1 + len(ITEM) :].lstrip(_BLANKS)
    return b"" if rest == b"]" else b"[" + rest.removeprefix(b",")


def _address(data: bytes | Raw) -> int:
    address: int = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    return address
