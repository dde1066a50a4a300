"""Reads the id of a response from the beginning of an answer of `/v1/responses`, whole or streamed."""

from __future__ import annotations

import re
from collections.abc import Callable

_ID = re.compile(rb'"id"\s*:\s*"([\x21\x23-\x5b\x5d-\x7e]{1,256})"')
"""The first of an answer is the response's own: engines write it before everything else that has one."""
_MOST_BYTES = 16 * 1024


class ResponseId:
    """Calls `found` once with the id and the pod that stores the response."""

    __slots__ = ("_beginning", "_found")

    def __init__(self, found: Callable[[str, str], None]) -> None:
        self._found = found
        self._beginning: bytes | None = b""

    def add(self, chunk: bytes, pod: str) -> None:
        """The next bytes of the answer of `pod`."""
        if self._beginning is None:
            return
        beginning = self._beginning + chunk[:_MOST_BYTES]
        match = _ID.search(beginning)
        if match is not None:
            self._found(match[1].decode(), pod)
        self._beginning = beginning if match is None and len(beginning) < _MOST_BYTES else None
