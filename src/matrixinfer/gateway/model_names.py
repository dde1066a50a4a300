"""Gives the model its name back in answers: the client sees the name that it asked for, whatever the engine calls it."""

from __future__ import annotations

import re
from collections.abc import Collection

import msgspec

_KEY = b'"model"'
_BLANK = b" \t"
_MAX_BLANKS = 32
"""A beginning with more blanks around the colon is not waited for."""


class Renamer:
    """Replaces an engine's names for a model in an answer in JSON, or in server-sent events that hold JSON.

    JSON escapes every quote within text, so that the key and the name cannot be part of generated text. What may be the
    beginning of the two waits for the next chunk; everything else passes on as it comes.
    """

    __slots__ = ("_held", "_longest", "_names", "_new", "_whole")

    def __init__(self, engine_names: Collection[str], client_name: str) -> None:
        self._names = [msgspec.json.encode(name) for name in engine_names]
        self._longest = max(map(len, self._names))
        names = b"|".join(map(re.escape, self._names))
        self._whole = re.compile(rb'("model"[ \t]*:[ \t]*)(?:%b)' % names)
        self._new = rb"\g<1>" + msgspec.json.encode(client_name).replace(b"\\", b"\\\\")
        self._held = b""

    def change(self, chunk: bytes) -> bytes:
        """The bytes that can be passed on so far, possibly none."""
        data = self._replaced(self._held + chunk)
        start = self._beginning(data)
        self._held = data[start:]
        return data[:start]

    def rest(self) -> bytes:
        """The bytes left at the end."""
        held, self._held = self._held, b""
        return held

    def _replaced(self, answer: bytes) -> bytes:
        return self._whole.sub(self._new, answer)

    def _beginning(self, data: bytes) -> int:
        """Where an incomplete key with that name begins at the end of `data`; its length if none does."""
        position = max(0, len(data) - len(_KEY) - self._longest - _MAX_BLANKS)
        while (position := data.find(b'"', position)) >= 0:
            if self._is_beginning(data[position:]):
                return position
            position += 1
        return len(data)

    def _is_beginning(self, data: bytes) -> bool:
        if len(data) <= len(_KEY):
            return _KEY.startswith(data)
        if not data.startswith(_KEY):
            return False
        rest = data[len(_KEY) :].lstrip(_BLANK)
        value = rest[1:].lstrip(_BLANK)
        return not rest or (rest.startswith(b":") and any(name.startswith(value) for name in self._names))
