"""How much of a request is decoded, known before any of it is. Pure.

Decoded JSON takes up to 150 times the memory of its bytes: an empty object is two bytes in a body and a hundred in
memory. The characters that begin or separate values bound what a body can become, and are counted in no time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from matrixinfer.errors import TokenizeError

SMALL_BYTES = 16 * 1024
"""Prompts up to this size count for nothing: they take two megabytes at most."""
LARGE_BYTES = 256 * 1024
"""Larger bodies are read in a thread. Others are decoded without counting, and count only while they wait for something."""
MEDIA_BYTES = 1024 * 1024
"""Larger bodies are read without the media in them."""
_SLICE = 64 * 1024
"""Other threads may run after so many bytes."""
_COMMA, _BRACE, _BIT = 0x2C, 0x7B, 0x20
"""An opening bracket differs from an opening brace in one bit."""
_VALUE_COST, _CONTAINER_COST = 64, 256
"""What a comma and an opening bracket or brace stand for in memory, at most, in bytes."""
_TEXT_COST = 8
"""A byte of text may be rendered once more, in strings of four bytes per character."""
_COST_PER_BYTE = 16
"""How many bytes the values of a request may take for each byte that a request may have."""
_IDS = 4
"""Token ids may have so many times the bytes of other prompts: they are kept in four bytes each."""


class TooMuch(TokenizeError):
    """A request has too much in it to be decoded; it is routed without token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The bounds on one request's prompt."""

    max_bytes: int
    """Bytes of a body without its images, audio and video."""
    max_items: int
    """Messages, parts of messages, tools, tool calls and documents."""

    @property
    def max_id_bytes(self) -> int:
        """Bytes of JSON that are token ids."""
        return self.max_bytes * _IDS

    def cost(self, body: bytes | memoryview, values: int | None = None) -> int:
        """The memory, in bytes, that decoding and rendering the body may take. Raises `TooMuch`.

        `values` is what its values may take, if that is known.
        """
        if len(body) > self.max_bytes:
            raise TooMuch(f"the request is larger than {self.max_bytes} bytes")
        values = values_of(body) if values is None else values
        self.check_values(values)
        return len(body) * _TEXT_COST + values

    def check_values(self, values: int) -> None:
        """Raise `TooMuch` if the values in a body may take more memory than allowed."""
        most = self.max_bytes * _COST_PER_BYTE
        if values > most:
            raise TooMuch(f"its JSON has so many values that decoding them could take more than {most} bytes")


def values_of(body: bytes | memoryview) -> int:
    """The memory, in bytes, that the values in a body, or in a part of one, may take."""
    cost = 0
    for start in range(0, len(body), _SLICE):
        some = _bytes(body, start)
        cost += int(np.count_nonzero(some == _COMMA)) * _VALUE_COST
        cost += int(np.count_nonzero((some | _BIT) == _BRACE)) * _CONTAINER_COST
    return cost


def count_of(body: bytes | memoryview, byte: int) -> int:
    """How often a byte occurs."""
    return sum(int(np.count_nonzero(_bytes(body, start) == byte)) for start in range(0, len(body), _SLICE))


def _bytes(body: bytes | memoryview, start: int) -> npt.NDArray[np.uint8]:
    """The slice of a body that begins at `start`."""
    return np.frombuffer(body, np.uint8, min(_SLICE, len(body) - start), start)


DEFAULT_BOUNDS = Bounds(max_bytes=4 * 1024 * 1024, max_items=10_000)
