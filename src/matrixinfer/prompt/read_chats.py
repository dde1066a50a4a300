"""Remembers chats that were read lately, so that one that continues such a chat is decoded only from where it goes on.

Why that is exact: everything up to the end of a body's last message is known to be valid, and to end inside the list
`messages` of the outermost object. How JSON goes on from a place depends only on which objects and lists are open there. So
a body that begins with the same bytes means what it means with one item in place of the messages so far (`stood_in`), but
for that item. Bytes are compared, not digests of them.
"""

from __future__ import annotations

import itertools
import re
import sys
import threading
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from msgspec import Raw

from matrixinfer.prompt.base import Rendered
from matrixinfer.prompt.bounds import values_of
from matrixinfer.prompt.cache import Lru

LEAST_BYTES = 8 * 1024
"""Shorter chats are decoded and rendered as fast as they are found and remembered."""
PLAIN_BYTES = 32 * 1024
"""So are those up to here, unless they bring tools, which are much of what templates write."""
MOST_BYTES = 1024 * 1024
"""Larger bodies are read without the media in them, so not as they are."""
_STAND_IN = b'"the messages before these"'
_SAMPLE_BYTES = 64
_STEPS = 5
"""Lengths are rounded down to one of two to the power of so many between a power of two and the next."""
_ALIKE = 64
"""How many chats with the same rounded length, and the same bytes before it, are kept: long instructions are shared by many."""
_BLANKS = b" \t\r\n"
_MESSAGES = re.compile(rb'"messages"[ \t\r\n]*:[ \t\r\n]*\[')
_LOOKED_AT = 16
"""How many bytes before a bracket are looked at to see which list it ends."""
_MAX_ROLE = 32
_MESSAGE_BYTES = 800
"""Memory of a plain message besides its text, decoded and as templates get it."""
_TEXT_COST = 8
"""A byte of any other text may take four in memory, decoded and rendered."""

_Place = tuple[int, bytes]
"""A rounded length, and a sample of the bytes before it."""


class SentTools(NamedTuple):
    """A chat's tools."""

    sent: bytes
    tools: list[dict[str, Any]] | None
    memory: int

    @classmethod
    def of(cls, sent: bytes, tools: list[dict[str, Any]] | None) -> SentTools:
        """The tools, which were sent as these bytes."""
        return cls(sent, tools, len(sent) * (1 + _TEXT_COST) + values_of(sent))


class Span(NamedTuple):
    """Where the list of messages is in a body."""

    start: int
    stop: int

    @classmethod
    def guessed(cls, body: bytes) -> Span | None:
        """From the first key `messages` to the last bracket. None if that ends another list, by how it looks.

        None for short bodies as well: their messages are found as fast by decoding.
        """
        if len(body) < PLAIN_BYTES:
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


class ReadChat(NamedTuple):
    """What is known of a chat that was read."""

    body: bytes
    start: int
    """Where in it the list of messages begins."""
    stop: int
    """Where in it the last message ends."""
    messages: list[dict[str, Any]]
    tools: SentTools
    cache_salt: str | None
    """A chat with another one shares nothing with this."""
    values: int | None
    """What the values up to there may take, see `Bounds`; None if it was not looked at as that of a large body."""
    rendered: Rendered
    memory: int
    """Bytes that the messages take, estimated."""
    place: _Place
    number: int
    before: int | None
    """The number of the chat that it continues."""

    def begins(self, body: bytes) -> bool:
        """Whether a body begins with all up to the last message of this."""
        end = self.stop - _SAMPLE_BYTES
        return body[end : self.stop] == self.body[end : self.stop] and body.startswith(self.body[:end])

    def stood_in(self, body: bytes) -> bytes | None:
        """A body that begins like this one, with one item in place of the messages that both have.

        None if that item could be mistaken for another one.
        """
        rest = body[self.stop :]
        return None if _STAND_IN in rest else b"%b[%b%b" % (body[: self.start], _STAND_IN, rest)

    def more(self, messages: Raw) -> bytes | None:
        """The JSON list of further messages, empty if there are none; `messages` are those of `stood_in`.

        None if they are another list: of equal keys, the last one counts.
        """
        listed = bytes(messages)
        if not listed.startswith(b"[" + _STAND_IN):
            return None
        further = listed[1 + len(_STAND_IN) :].lstrip(_BLANKS)
        return b"" if further == b"]" else b"[" + further.removeprefix(b",")

    def span(self, messages: Raw) -> Span:
        """Where the messages are in the body; `messages` are those of `stood_in`."""
        return Span(self.start, self.stop + memoryview(messages).nbytes - 1 - len(_STAND_IN))


def stood_in(body: bytes, span: Span) -> bytes | None:
    """The body with one item in place of the messages in this span. None if it has that item already."""
    head, tail = body[: span.start], body[span.stop :]
    return None if _STAND_IN in head or _STAND_IN in tail else b"%b[%b]%b" % (head, _STAND_IN, tail)


def is_stand_in(messages: Raw) -> bool:
    """Whether the messages in a body are those that `stood_in` has put there, so that they were in this very span.

    They may be others: of equal keys, the last one counts, and what looks like a key may be part of a text.
    """
    return bytes(messages) == b"[%b]" % _STAND_IN


class ReadChats:
    """Chats read lately, in up to `max_bytes`; the least recently used go first. Thread-safe.

    A chat is found by a sample of its bytes near its end, among those that are at least half as long as a body.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._chats: Lru[int, ReadChat] = Lru(max_bytes)
        self._numbers = itertools.count()
        self._alike: dict[_Place, list[int]] = {}
        self._lengths: Counter[int] = Counter()
        self._sorted: list[int] = []
        """The rounded lengths of all chats."""
        self._lock = threading.Lock()

    @property
    def memory(self) -> int:
        """Bytes in use, estimated."""
        return self._chats.bytes

    def __len__(self) -> int:
        return len(self._chats)

    def find(self, body: bytes) -> ReadChat | None:
        """The chat that `body` continues, or is once more."""
        if not LEAST_BYTES <= len(body) <= MOST_BYTES:
            return None
        with self._lock:
            for i in range(bisect_right(self._sorted, len(body)) - 1, -1, -1):
                length = self._sorted[i]
                if length < len(body) // 2:
                    break
                if (found := self._longest((length, body[length - _SAMPLE_BYTES : length]), body)) is not None:
                    return self._chats.get(found.number)
        return None

    def _longest(self, place: _Place, body: bytes) -> ReadChat | None:
        """The longest chat at a place that `body` begins with."""
        alike = self._alike.get(place, [])
        chats = [chat for each in alike if (chat := self._chats.peek(each)) is not None]
        found = max(
            (each for each in chats if each.begins(body)),
            key=lambda each: each.stop,
            default=None,
        )
        if found is not None:
            alike.remove(found.number)
            alike.append(found.number)
        return found

    def keep(
        self,
        body: bytes,
        span: Span,
        messages: list[dict[str, Any]],
        tools: SentTools,
        *,
        cache_salt: str | None,
        earlier: ReadChat | None = None,
        values: int | None = None,
    ) -> Rendered | None:
        """Remember a chat, and no longer what the `earlier` one that it continues has continued itself.

        So the last turn of a conversation can be taken again. Returns where renderings of this chat are kept.
        `values` is what the values in a large body may take.
        """
        stop = span.stop - 1
        if body[stop - 1] in _BLANKS:
            stop = span.start + len(body[span.start : stop].rstrip(_BLANKS))
        least = LEAST_BYTES if tools.tools else PLAIN_BYTES
        if not least <= stop <= len(body) <= min(MOST_BYTES, self._max_bytes):
            return None
        before, known, memory = 0, 0, 0
        if earlier is not None:
            before, known, memory = earlier.stop, len(earlier.messages), earlier.memory
        if earlier is not None and stop == before and tools is earlier.tools:
            return earlier.rendered
        chat = ReadChat(
            body=body,
            start=span.start,
            stop=stop,
            messages=messages,
            tools=tools,
            cache_salt=cache_salt,
            values=None if values is None else values - values_of(memoryview(body)[stop:]),
            rendered=Rendered() if earlier is None else Rendered(earlier.rendered),
            memory=memory + _memory(memoryview(body)[before:stop], messages[known:]),
            place=(length := _rounded(stop), body[length - _SAMPLE_BYTES : length]),
            number=next(self._numbers),
            before=None if earlier is None else earlier.number,
        )
        with self._lock:
            if earlier is not None and earlier.before is not None and (gone := self._chats.pop(earlier.before)):
                self._forget(gone)
            self._put(chat)
        return chat.rendered

    def _put(self, chat: ReadChat) -> None:
        length = chat.place[0]
        alike = self._alike.setdefault(chat.place, [])
        alike.append(chat.number)
        if not self._lengths[length]:
            insort(self._sorted, length)
        self._lengths[length] += 1
        gone = self._chats.put(chat.number, chat, chat.memory + len(chat.body) + chat.tools.memory)
        if len(alike) > _ALIKE and (first := self._chats.pop(alike[0])) is not None:
            gone.append(first)
        if chat.number not in self._chats:
            gone.append(chat)  # it is larger than all may be
        for each in gone:
            self._forget(each)

    def _forget(self, chat: ReadChat) -> None:
        """Remove a chat that is not kept any more from what it is found by."""
        alike = self._alike[chat.place]
        alike.remove(chat.number)
        if not alike:
            del self._alike[chat.place]
        length = chat.place[0]
        self._lengths[length] -= 1
        if not self._lengths[length]:
            del self._lengths[length]
            del self._sorted[bisect_left(self._sorted, length)]


def _rounded(length: int) -> int:
    """A length rounded down, by less than one part in two to the power of `_STEPS`."""
    step = 1 << max(0, length.bit_length() - 1 - _STEPS)
    return length - length % step


def _has_short_role(message: dict[str, Any]) -> bool:
    """Whether a message has a role that takes next to no memory, and nothing else but content."""
    role = message.get("role")
    return len(message) == 2 and type(role) is str and len(role) <= _MAX_ROLE


def _address(data: bytes | Raw) -> int:
    address: int = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    return address


def _memory(sent: memoryview, messages: Sequence[dict[str, Any]]) -> int:
    """What messages take that were sent as these bytes, decoded and rendered."""
    texts = [content for each in messages if type(content := each.get("content")) is str]
    memory = len(messages) * _MESSAGE_BYTES + 2 * sum(map(sys.getsizeof, texts))
    if len(texts) == len(messages) and all(map(_has_short_role, messages)):
        return memory
    return memory + _TEXT_COST * max(0, len(sent) - sum(map(len, texts))) + values_of(sent)
