"""What a line of the access log says. The gateway writes it, and a replay reads it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal, TypeAlias

import msgspec

Outcome: TypeAlias = Literal["answered", "refused", "broken_off", "client_left"]
HASH_MASK = (1 << 53) - 1
"""Block hashes are cut to 53 bits, which every reader of JSON keeps exactly."""


class AccessEntry(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One request. What is not known is left out of the line."""

    at: float
    """When it arrived, Unix time in seconds."""
    id: str
    path: str
    outcome: Outcome
    """`refused`: answered with an error, by the gateway or a pod; `broken_off`: by the pod, in the middle of the answer."""
    status: int
    error: str | None = None
    """The gateway's own reason, as in the error that it answered with."""
    trace: str | None = None
    """Id of its trace, if that is sampled."""
    tenant: str | None = None
    caller: str | None = None
    """The name of the key, or the token's subject, with which it was sent."""
    model: str | None = None
    pod: str | None = None
    """The endpoint that had the request last."""
    tried: list[str] = []
    """Endpoints that had it before, in order."""
    session: str | None = None
    """Hash of the session's id."""
    prompt_tokens: int | None = None
    """As the engine counts them; without its report, as the gateway does."""
    output_tokens: int | None = None
    """As the engine reports them."""
    stream_events: int | None = None
    """Server-sent events of a streamed answer: about as many as tokens."""
    predicted_hit_tokens: int | None = None
    cached_tokens: int | None = None
    """The reported hit."""
    degraded: dict[str, str] = {}
    """What the decision had to do without, and why."""
    ms: dict[str, float] = {}
    """Milliseconds of each step; `first_byte` and `total` count from the arrival."""
    block_size: int | None = None
    shared_blocks: int = 0
    """The prompt begins with so many blocks of an earlier line; the hash of the last of them is `after`."""
    after: int | None = None
    blocks: Sequence[int] = ()
    """Hashes of the blocks that follow; each stands for its block and all before it."""
    sampled: bool = True
    """False for a request that is written only because it failed: its session is not in the sample."""


class WrittenBlocks:
    """Remembers which block hashes were written, so that each line needs only the new ones."""

    __slots__ = ("_known", "_most")

    def __init__(self, most: int = 1 << 18) -> None:
        self._known: set[int] = set()
        self._most = most

    def forget(self) -> None:
        """Lines begin from nothing again: earlier ones are lost, or in another file."""
        self._known.clear()

    def shorten(self, entry: AccessEntry) -> None:
        """Leave out the blocks of an entry that were written before, and remember the others."""
        chain, known = entry.blocks, self._known
        shared = len(chain)
        while shared and chain[shared - 1] not in known:
            shared -= 1
        if shared:
            entry.shared_blocks, entry.after, entry.blocks = shared, chain[shared - 1], chain[shared:] or ()
        if len(known) + len(entry.blocks) > self._most:
            known.clear()
        known.update(chain if not known else entry.blocks)


def text_line(entry: AccessEntry) -> str:
    """An entry for people, in one line."""
    when = datetime.fromtimestamp(entry.at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    fields = {
        "model": entry.model,
        "pod": entry.pod,
        "tried": ",".join(entry.tried) or None,
        "error": entry.error,
        "prompt_tokens": entry.prompt_tokens,
        "output_tokens": entry.output_tokens,
        "predicted_hit_tokens": entry.predicted_hit_tokens,
        "cached_tokens": entry.cached_tokens,
        "degraded": ",".join(entry.degraded) or None,
        "first_byte_ms": entry.ms.get("first_byte"),
        "total_ms": entry.ms.get("total"),
        "session": entry.session,
        "trace": entry.trace,
        "id": entry.id,
    }
    shown = [f"{name}={_plain(value)}" for name, value in fields.items() if value is not None]
    return " ".join((when, str(entry.status), entry.outcome, entry.path, *shown))


def _plain(value: object) -> str:
    """A value as a bare word, or quoted and escaped."""
    text = str(value)
    is_word = text.isascii() and text.isprintable() and not set(text) & set(' "=')
    return text if is_word else msgspec.json.encode(text).decode()
