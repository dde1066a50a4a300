"""What one gateway tells the others: one bounded msgpack message. Pure.

It holds the gateway's whole load, so that a lost message costs nothing, and the prompts sent since the last one. Fields that
are not known are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta

from matrixinfer.errors import MatrixInferError

MAX_BYTES = 1 << 20
"""Of a message."""
MAX_PROMPTS = 256
MAX_ENDPOINTS = 4096
"""Whose load one message tells, the most loaded ones."""
MAX_NAME = 512
"""Characters of a name."""
BLOCK_BYTES = 8
_OVERHEAD = 16
"""Bytes of a prompt's entry besides its names and blocks, at most."""

Name: TypeAlias = Annotated[str, Meta(max_length=MAX_NAME)]
_Amount: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 40)]


class MalformedMessage(MatrixInferError):
    """It is not what a gateway would tell."""


class Load(msgspec.Struct, frozen=True, array_like=True):
    """At one endpoint."""

    in_flight: _Amount
    queued_tokens: _Amount


class Sent(msgspec.Struct, frozen=True, array_like=True):
    """One prompt that was sent to an endpoint."""

    endpoint: Name
    model: Name
    computed: bool
    """It has been computed there, and the endpoint's events may not tell. Else it is on its way."""
    packed: bytes
    """Hashes of consecutive blocks, 8 bytes each, big endian; from the prompt's start if it is computed."""

    def __post_init__(self) -> None:
        if len(self.packed) % BLOCK_BYTES:
            raise ValueError("half a block")

    @property
    def blocks(self) -> list[int]:
        """The hashes."""
        hashes: list[int] = np.frombuffer(self.packed, dtype=">u8").tolist()
        return hashes


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """See the module."""

    gateway: Annotated[str, Meta(min_length=1, max_length=64)]
    """What tells one gateway process from others."""
    load: Annotated[dict[Name, Load], Meta(max_length=MAX_ENDPOINTS)]
    """Endpoints without any are absent."""
    sent: Annotated[list[Sent], Meta(max_length=MAX_PROMPTS)]


class Prompt(NamedTuple):
    """One prompt that is to be told; see `Sent`."""

    endpoint: str
    model: str
    computed: bool
    hashes: Sequence[int]
    start: int = 0
    """The first of the `hashes` that is told."""


_DECODER = msgspec.msgpack.Decoder(Message)


def decode(data: bytes) -> Message:
    """Read a message. Raises `MalformedMessage`."""
    if len(data) > MAX_BYTES:
        raise MalformedMessage(f"{len(data)} bytes")
    try:
        return _DECODER.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(str(error)) from error


def encode(gateway: str, load: Mapping[str, Load], prompts: Sequence[Prompt]) -> tuple[bytes, int]:
    """A message of at most `MAX_BYTES`, and how many prompts it does not tell, or only the beginnings of."""
    told = _fitting(load)
    budget = MAX_BYTES - len(_encoded(gateway, told, ())) - 8
    fitting: list[Prompt] = []
    for prompt in prompts[:MAX_PROMPTS]:
        names = len(prompt.endpoint.encode()) + len(prompt.model.encode()) + _OVERHEAD
        if names <= budget and max(len(prompt.endpoint), len(prompt.model)) <= MAX_NAME:
            budget -= names
            fitting.append(prompt)
    lengths = [len(prompt.hashes) - prompt.start for prompt in fitting]
    limit = longest(lengths, budget // BLOCK_BYTES)
    sent = [_packed(prompt, limit) for prompt in fitting] if limit else []
    whole = sum(length <= limit for length in lengths)
    return _encoded(gateway, told, sent), len(prompts) - whole


def longest(lengths: Sequence[int], budget: int) -> int:
    """The largest length to which all may be cut so that their sum is at most `budget`; that of the longest if it fits."""
    for done, length in enumerate(sorted(lengths)):
        share = budget // (len(lengths) - done)
        if length > share:
            return share
        budget -= length
    return max(lengths, default=0)


def _fitting(load: Mapping[str, Load]) -> dict[str, Load]:
    """What may take half of a message, the most loaded endpoints first."""
    told = {name: each for name, each in load.items() if len(name) <= MAX_NAME}
    while len(told) > MAX_ENDPOINTS or len(_encoded("", told, ())) > MAX_BYTES // 2:
        most = sorted(told, key=lambda name: told[name].in_flight, reverse=True)
        told = {name: told[name] for name in most[: min(MAX_ENDPOINTS, len(told) // 2)]}
    return told


def _packed(prompt: Prompt, limit: int) -> Sent:
    hashes = prompt.hashes[prompt.start : prompt.start + limit]
    return Sent(prompt.endpoint, prompt.model, prompt.computed, np.array(hashes, dtype=">u8").tobytes())


def _encoded(gateway: str, load: dict[str, Load], sent: Sequence[Sent]) -> bytes:
    return msgspec.msgpack.encode(Message(gateway=gateway, load=load, sent=list(sent)))
