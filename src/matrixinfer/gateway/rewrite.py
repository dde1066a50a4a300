"""The body that a pod gets: the client's own bytes, unless a field must differ for that pod."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from typing import NamedTuple

import msgspec

from matrixinfer.errors import UNREADABLE, InvalidRequest
from matrixinfer.pods.registry import PodRegistry
from matrixinfer.prompt import opaque
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.fields import top_level
from matrixinfer.prompt.openai import CHAT_PATH, COMPLETIONS_PATH

_ASKED = b'{"include_usage":true}'
_RANK_FIELDS = ("routed_dp_rank", "data_parallel_rank")
"""SGLang's field that pins a request to a data-parallel rank, and the older name of it."""


class PodBody(NamedTuple):
    """What is sent to a pod."""

    bytes: bytes
    adds_usage: bool
    """It asks for a usage report that the client did not ask for, and must not see."""
    rank: int | None = None
    """The data-parallel rank to ask for, as the engine's API counts; None where the engine is to choose."""
    renamed: tuple[Collection[str], str] | None = None
    """The names by which the engine may answer, and the one that the client asked for, where they differ."""


class BodyRewriter:
    """Rewrites bodies for pods that know the model under another name, or take the rank in the body.

    With `adds_usage`, streams that do not ask for a usage report are made to: it says how many tokens were cached.
    """

    def __init__(self, registry: PodRegistry, *, adds_usage: bool) -> None:
        self._registry = registry
        self._adds_usage = adds_usage

    def body_for(
        self, pod: str, prompt: Prompt, body: bytes, rank: int | None = None, *, adds_usage: bool = False
    ) -> PodBody:
        """The body for the pod of that name, or a rank of it; `body` itself when nothing must differ.

        With `adds_usage` this stream is made to report its usage.

        Raises `InvalidRequest` if a field must differ in a body whose fields cannot be read: `prompt` was read from it,
        but keys that routing does not need need not be UTF-8.
        """
        position = None if rank is None else self._registry.position(pod, rank)
        pinned = position if position is not None and self._registry.engine_of(pod) == "sglang" else None
        name, asked = self._registry.name_at(pod, prompt.model), prompt.asked or prompt.model
        renamed = (self._registry.spellings(pod, name), asked) if prompt.names_model and name != asked else None
        named = self._named(name, prompt, body, pinned, adds_usage=adds_usage or self._adds_usage)
        return named._replace(rank=position, renamed=renamed)

    def _named(self, name: str, prompt: Prompt, body: bytes, pinned: int | None, *, adds_usage: bool) -> PodBody:
        asked = prompt.asked or prompt.model
        if prompt.opaque:
            is_known = name == asked or not prompt.names_model
            return PodBody(body if is_known else opaque.with_model(body, name), adds_usage=False)
        if not prompt.names_model:
            body, asked = with_model(body, name), name
        may_add = adds_usage and prompt.stream and prompt.path in (CHAT_PATH, COMPLETIONS_PATH)
        if not may_add and name == asked:
            return PodBody(pin_rank(body, pinned), adds_usage=False)
        if may_add and name == prompt.model and b"stream_options" not in body:
            return PodBody(pin_rank(_with_field(body, "stream_options", _ASKED), pinned), adds_usage=True)
        try:
            fields = top_level(body)
        except InvalidRequest:
            if name != asked:
                raise
            return PodBody(pin_rank(body, pinned), adds_usage=False)
        options = _with_usage(fields.get("stream_options")) if may_add else None
        if options is None and name == asked:
            return PodBody(pin_rank(body, pinned), adds_usage=False)
        if options is not None:
            fields["stream_options"] = options
        fields["model"] = msgspec.Raw(msgspec.json.encode(name))
        return PodBody(pin_rank(msgspec.json.encode(fields), pinned), adds_usage=options is not None)


def with_model(body: bytes, model: str) -> bytes:
    """A JSON object that names no model with one, and otherwise the client's own bytes.

    The field comes last: of equal keys, readers of JSON take the last one, and the client's may be null.
    """
    return _with_field(body, "model", msgspec.json.encode(model))


def _with_field(body: bytes, field: str, value: bytes) -> bytes:
    """A JSON object with one more field at its end, and otherwise the client's own bytes."""
    fields = body.rstrip(b" \t\r\n")[:-1].rstrip(b" \t\r\n")
    return b'%b%b"%b":%b}' % (fields, b"" if fields.endswith(b"{") else b",", field.encode(), value)


def pin_rank(body: bytes, rank: int | None) -> bytes:
    """A JSON object with SGLang's field for the rank, and otherwise the client's own bytes.

    The field comes last: of equal keys, readers of JSON take the last one. A client that sends the field itself, which
    cannot know the ranks of pods, gets it replaced.
    """
    if rank is None:
        return body
    if any(field.encode() in body for field in _RANK_FIELDS):
        with suppress(InvalidRequest):
            fields = top_level(body)
            body = msgspec.json.encode({key: value for key, value in fields.items() if key not in _RANK_FIELDS})
    return b'%b,"%b":%d}' % (body.rstrip(b" \t\r\n")[:-1], _RANK_FIELDS[0].encode(), rank)


def _with_usage(options: msgspec.Raw | None) -> msgspec.Raw | None:
    """Change a request's `stream_options` to ask for usage once, at the end.

    None when they must stay: the client asks for usage itself, or the engine will refuse them.
    """
    given: dict[str, msgspec.Raw] = {}
    try:
        if options is not None and bytes(options) != b"null":
            given = top_level(bytes(options))
        asked = msgspec.json.decode(given.get("include_usage", b"null"))
    except (InvalidRequest, *UNREADABLE):
        return None
    if asked not in (None, False):
        return None
    kept = {key: value for key, value in given.items() if key != "continuous_usage_stats"}
    return msgspec.Raw(msgspec.json.encode(kept | {"include_usage": msgspec.Raw(b"true")}))
