"""The message that a gateway publishes to its peers: bounded in size, encoded as msgpack. Pure.

It contains the gateway's whole load, so a lost message does no lasting harm, and the prompts sent since the last
message. Unknown fields are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta

from matrixinfer.errors import UNREADABLE, MatrixInferError

MAX_BYTES = 1 << 20
"""Largest size of a message."""
MAX_PROMPTS = 256
MAX_ENDPOINTS = 4096
"""Most endpoints whose load one message reports; the most loaded ones are chosen."""
MAX_EJECTED = 256
"""Most ejected endpoints that one message reports."""
MAX_NAME = 512
"""Longest name of an endpoint or a model, in characters."""
BLOCK_BYTES = 8
_OVERHEAD = 16
"""Upper bound for the bytes of a prompt's entry besides its names and blocks."""

Name: TypeAlias = Annotated[str, Meta(max_length=MAX_NAME)]
_Amount: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 40)]


class MalformedMessage(MatrixInferError):
    """Bytes from the channel are not a valid message."""


class Load(msgspec.Struct, frozen=True, array_like=True):
    """A gateway's load at one endpoint."""

    in_flight: _Amount
    queued_tokens: _Amount


class Sent(msgspec.Struct, frozen=True, array_like=True):
    """One prompt that was sent to an endpoint."""

    endpoint: Name
    model: Name
    computed: bool
    """True if the endpoint has computed the prompt, which its events may not report; False if it is in flight."""
    packed: bytes
    """Hashes of consecutive blocks, 8 bytes each, big-endian. If `computed`, they begin at the prompt's start."""
    by_bytes: bool = False
    """True if `computed` and the hashes are of chunks of the prompt's bytes. Earlier releases ignore this field."""

    def __post_init__(self) -> None:
        if len(self.packed) % BLOCK_BYTES:
            raise ValueError("half a block")

    @property
    def blocks(self) -> list[int]:
        """The unpacked hashes."""
        hashes: list[int] = np.frombuffer(self.packed, dtype=">u8").tolist()
        return hashes


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The content of a message."""

    gateway: Annotated[str, Meta(min_length=1, max_length=64)]
    """Unique id of the gateway process."""
    load: Annotated[dict[Name, Load], Meta(max_length=MAX_ENDPOINTS)]
    """The load per endpoint; endpoints without load are absent."""
    sent: Annotated[list[Sent], Meta(max_length=MAX_PROMPTS)]
    ejected: Annotated[list[Name], Meta(max_length=MAX_EJECTED)] = []
    """Endpoints that it has ejected and not readmitted. Earlier releases ignore this field."""


class Prompt(NamedTuple):
    """A prompt to publish; see `Sent`."""

    endpoint: str
    model: str
    computed: bool
    hashes: Sequence[int]
    start: int = 0
    """Position of the first hash to publish."""
    by_bytes: bool = False


_DECODER = msgspec.msgpack.Decoder(Message)


def decode(data: bytes) -> Message:
    """Read a message. Raises `MalformedMessage`."""
    if len(data) > MAX_BYTES:
        raise MalformedMessage(f"{len(data)} bytes")
    try:
        return _DECODER.decode(data)
    except UNREADABLE as error:
        raise MalformedMessage(str(error)) from error


def encode(
    gateway: str, load: Mapping[str, Load], prompts: Sequence[Prompt], ejected: Sequence[str] = ()
) -> tuple[bytes, int]:
    """A message of at most `MAX_BYTES`, and the number of prompts that it omits or truncates."""
    fitting_load = _fitting(load)
    out = [name for name in ejected if len(name) <= MAX_NAME][:MAX_EJECTED]
    budget = MAX_BYTES - len(_encoded(gateway, fitting_load, (), out)) - 8
    fitting: list[Prompt] = []
    for prompt in prompts[:MAX_PROMPTS]:
        names = len(prompt.endpoint.encode()) + len(prompt.model.encode()) + _OVERHEAD
        if names <= budget and max(len(prompt.endpoint), len(prompt.model)) <= MAX_NAME:
            budget -= names
            fitting.append(prompt)
    lengths = [len(prompt.hashes) - prompt.start for prompt in fitting]
    limit = length_limit(lengths, budget // BLOCK_BYTES)
    sent = [_packed(prompt, limit) for prompt in fitting] if limit else []
    whole = sum(length <= limit for length in lengths)
    return _encoded(gateway, fitting_load, sent, out), len(prompts) - whole


def length_limit(lengths: Sequence[int], budget: int) -> int:
    """The largest limit for which the sum of `min(length, limit)` is at most `budget`; at most the longest length."""
    for done, length in enumerate(sorted(lengths)):
        share = budget // (len(lengths) - done)
        if length > share:
            return share
        budget -= length
    return max(lengths, default=0)


def _fitting(load: Mapping[str, Load]) -> dict[str, Load]:
    """The load that fits into half of a message; if not all fits, the most loaded endpoints."""
    fitting_load = {name: each for name, each in load.items() if len(name) <= MAX_NAME}
    while len(fitting_load) > MAX_ENDPOINTS or len(_encoded("", fitting_load, ())) > MAX_BYTES // 2:
        most = sorted(fitting_load, key=lambda name: fitting_load[name].in_flight, reverse=True)
        fitting_load = {name: fitting_load[name] for name in most[: min(MAX_ENDPOINTS, len(fitting_load) // 2)]}
    return fitting_load


def _packed(prompt: Prompt, limit: int) -> Sent:
    hashes = prompt.hashes[prompt.start : prompt.start + limit]
    packed = np.array(hashes, dtype=">u8").tobytes()
    return Sent(prompt.endpoint, prompt.model, prompt.computed, packed, prompt.by_bytes)


def _encoded(gateway: str, load: dict[str, Load], sent: Sequence[Sent], ejected: Sequence[str] = ()) -> bytes:
    return msgspec.msgpack.encode(Message(gateway=gateway, load=load, sent=list(sent), ejected=list(ejected)))
