"""Remembers chats that were read lately, so that one that continues such a chat is decoded only from where it goes on.

Why that is exact: everything up to the end of a body's last message is known to be valid, and to end inside the list
`messages` of the outermost object. How JSON goes on from a place depends only on which objects and lists are open there. So
another body that begins with the same bytes is decoded with one item in place of the messages so far (`stand_in`). Bytes
are compared, not digests of them.
"""

from __future__ import annotations

import itertools
import sys
import threading
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from msgspec import Raw

from matrixinfer.prompt.base import Rendered
from matrixinfer.prompt.bounds import values_of
from matrixinfer.prompt.cache import Lru
from matrixinfer.prompt.stand_in import ITEM, Span

LEAST_BYTES = 8 * 1024
"""Shorter chats are decoded and rendered as fast as they are found and remembered."""
PLAIN_BYTES = 32 * 1024
"""So are those up to here, unless they bring tools, which are much of what templates write."""
MOST_BYTES = 1024 * 1024
"""Larger bodies are read without the media in them, not as they are."""
_SAMPLE_BYTES = 64
_STEPS = 5
"""Between a power of two and the next, lengths are rounded down to one of 2 ** 5."""
_ALIKE = 64
"""How many chats with the same place are kept: long instructions are shared by many."""
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
        """The tools that were sent as these bytes."""
        return cls(sent, tools, len(sent) * (1 + _TEXT_COST) + (values_of(sent) if tools else 0))


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
    """A chat with another salt shares nothing with this one."""
    values: int | None
    """What the values up to there may take, see `Bounds`; None if they were not counted, as in small bodies."""
    rendered: Rendered
    memory: int
    """Bytes that the messages take, decoded and rendered once, estimated."""
    place: _Place
    number: int
    before: int | None
    """The number of the chat that it continues."""

    def begins(self, body: bytes) -> bool:
        """Whether a body begins with all of this one up to its last message."""
        end = self.stop - _SAMPLE_BYTES
        return body[end : self.stop] == self.body[end : self.stop] and body.startswith(self.body[:end])

    def span(self, messages: Raw) -> Span:
        """Where the messages are in a body that begins like this one; `messages` are those of `without_known`."""
        return Span(self.start, self.stop + memoryview(messages).nbytes - len(b"[" + ITEM))


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
        """The chat whose messages `body` begins with: it continues that chat, or repeats it."""
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
        found = max((each for each in chats if each.begins(body)), key=lambda each: each.stop, default=None)
        if found is not None:
            alike.remove(found.number)
            alike.append(found.number)
        return found

    def counted(self, body: bytes) -> tuple[int, int]:
        """Up to where the values of a large chat were counted before, and what they may take up to there."""
        earlier = self.find(body)
        return (0, 0) if earlier is None or earlier.values is None else (earlier.stop, earlier.values)

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
        """Remember a chat. Returns where its renderings are kept; None if it is too short, or too long, to be remembered.

        The `earlier` chat, which it continues, stays, so that its last turn can be taken again; the one before that goes.
        `values` is what the values in a large body may take.
        """
        stop = span.last_stop(body)
        least = LEAST_BYTES if tools.tools else PLAIN_BYTES
        if not least <= stop <= len(body) <= min(MOST_BYTES, self._max_bytes):
            return None
        if earlier is not None and stop == earlier.stop and tools is earlier.tools:
            return earlier.rendered
        length, view = _rounded(stop), memoryview(body)
        chat = ReadChat(
            body=body,
            start=span.start,
            stop=stop,
            messages=messages,
            tools=tools,
            cache_salt=cache_salt,
            values=None if values is None else values - values_of(view[stop:]),
            rendered=Rendered() if earlier is None else Rendered(earlier.rendered),
            memory=_memory(view[:stop], messages, earlier),
            place=(length, body[length - _SAMPLE_BYTES : length]),
            number=next(self._numbers),
            before=None if earlier is None else earlier.number,
        )
        with self._lock:
            if earlier is not None and earlier.before is not None and (gone := self._chats.pop(earlier.before)):
                self._forget(gone)
            self._put(chat)
        return chat.rendered

    def _put(self, chat: ReadChat) -> None:
        """Add a chat, and drop those that there is no room for."""
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
            gone.append(chat)  # it is too large for the cache
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


def _has_short_role(message: dict[str, Any]) -> bool:
    """Whether a message has a role that takes next to no memory, and nothing else but content."""
    role = message.get("role")
    return len(message) == 2 and type(role) is str and len(role) <= _MAX_ROLE


def _rounded(length: int) -> int:
    step = 1 << max(0, length.bit_length() - 1 - _STEPS)
    return length - length % step


def _memory(sent: memoryview, messages: Sequence[dict[str, Any]], earlier: ReadChat | None) -> int:
    """What messages take that were sent as these bytes, decoded and rendered."""
    if earlier is None:
        return _own_memory(sent, messages)
    return earlier.memory + _own_memory(sent[earlier.stop :], messages[len(earlier.messages) :])


def _own_memory(sent: memoryview, messages: Sequence[dict[str, Any]]) -> int:
    texts = [content for each in messages if type(content := each.get("content")) is str]
    memory = len(messages) * _MESSAGE_BYTES + 2 * sum(map(sys.getsizeof, texts))
    if len(texts) == len(messages) and all(map(_has_short_role, messages)):
        return memory
    return memory + _TEXT_COST * max(0, len(sent) - sum(map(len, texts))) + values_of(sent)
