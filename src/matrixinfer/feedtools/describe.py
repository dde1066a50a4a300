"""KV events as text and as values for JSON, without prompts and salts, and with token ids only on request."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from msgspec import UNSET

from matrixinfer.kvevents.wire import AllBlocksCleared, BlockRemoved, BlockStored, EngineHash, Event, tokens_of

TOKENS_SHOWN = 8
_NAME_LENGTH = 64
_DAY = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One thing that happened to a feed."""

    kind: str
    """`stored`, `removed`, `cleared`, or what happened to the feed: `gap`, `restart`, …"""
    words: str
    seq: int | None = None
    """Number of the frame."""
    time: float | None = None
    """Seconds since the epoch, on the engine's clock."""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_event(self) -> bool:
        """Whether this is an event of the engine."""
        return self.kind in ("stored", "removed", "cleared")

    def __str__(self) -> str:
        """`#42 12:00:01.234  stored 3 blocks …`; only the words if the line is not about a frame."""
        return self.words if self.seq is None else f"#{self.seq} {clock(self.time)}  {self.words}"

    def value(self) -> dict[str, Any]:
        """The line as an object for JSON."""
        return {"kind": self.kind, "seq": self.seq, "time": self.time, **self.details}


def describe(event: Event, *, seq: int, time: float, with_tokens: bool = False) -> Line:
    """One event of frame `seq`; `with_tokens` shows the first few token ids."""
    if isinstance(event, BlockStored):
        words, details = _stored(event, with_tokens)
        kind = "stored"
    elif isinstance(event, BlockRemoved):
        kind, words = "removed", f"removed {plural(len(event.block_hashes), 'block')}{_place(event, 'from')}"
        details = {"blocks": [_hex(name) for name in event.block_hashes], **_where(event)}
    elif isinstance(event, AllBlocksCleared):
        kind, words, details = "cleared", "cleared everything", {}
    return Line(kind=kind, words=words, seq=seq, time=time if math.isfinite(time) else None, details=details)


def plural(count: int, noun: str) -> str:
    """`1 block`, `2 blocks`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def tallied(*counts: tuple[int, str]) -> list[str]:
    """The counts that are not zero, each with its noun."""
    return [plural(count, noun) for count, noun in counts if count]


def listed(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def clock(time: float | None) -> str:
    """Time of day, UTC, to the millisecond."""
    if time is None or not math.isfinite(time * 1000):
        return "--:--:--.---"
    milliseconds = math.floor(time * 1000) % (_DAY * 1000)
    seconds, milliseconds = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{milliseconds:03}"


def shown(text: str) -> str:
    """Text from the network, shortened, and without control characters."""
    cut = text[:_NAME_LENGTH] + "…" * (len(text) > _NAME_LENGTH)
    return "".join(char if char.isprintable() else "?" for char in cut)


def _stored(event: BlockStored, with_tokens: bool) -> tuple[str, dict[str, Any]]:
    count = len(event.block_hashes)
    words = f"stored {plural(count, 'block')} of {plural(event.block_size, 'token')}"
    if event.parent_block_hash is None:
        words += " at the start of a prompt"
    else:
        words += f" after {_hex(event.parent_block_hash)[:8]}…"
    words += _place(event, "on")
    adapter = event.lora_name if isinstance(event.lora_name, str) else None
    if adapter is not None:
        words += f", for adapter {shown(adapter)}"
    elif event.lora_id is not None:
        words += f", for adapter number {event.lora_id}"
    extra = _has_extra_keys(event)
    if extra:
        words += ", with extra keys (salt or media)"
    details = {
        "blocks": [_hex(name) for name in event.block_hashes],
        "parent": None if event.parent_block_hash is None else _hex(event.parent_block_hash),
        "block_size": event.block_size,
        "adapter": adapter,
        "extra_keys": extra,
        **_where(event),
    }
    if with_tokens:
        details["first_tokens"] = tokens = _first_tokens(event)
        words += f"; tokens {' '.join(map(str, tokens))} …" if tokens else ""
    return words, details


def _has_extra_keys(event: BlockStored) -> bool | None:
    """Whether a block depends on more than tokens and adapter; None if the layout does not say."""
    if event.extra_keys is UNSET:
        return None
    per_block = [keys for keys in event.extra_keys or () if isinstance(keys, list)]
    return any(key != event.lora_name for keys in per_block for key in keys)


def _first_tokens(event: BlockStored) -> list[int] | None:
    """The first few token ids; None if the event's tokens do not fit its blocks."""
    packed = tokens_of(event)
    if packed is None:
        return None
    return [token for (token,) in struct.iter_unpack(">I", packed[: TOKENS_SHOWN * 4])]


def _where(event: BlockStored | BlockRemoved) -> dict[str, Any]:
    return {"medium": event.medium, "group": event.group_idx}


def _place(event: BlockStored | BlockRemoved, preposition: str) -> str:
    medium = "" if event.medium is None else f", {preposition} {shown(event.medium)}"
    return medium + (f", group {event.group_idx}" if event.group_idx else "")


def _hex(name: EngineHash) -> str:
    """An engine's name for a block, in hexadecimal: 16 digits, or the whole byte string."""
    return name.hex() if isinstance(name, bytes) else f"{name & (1 << 64) - 1:016x}"
