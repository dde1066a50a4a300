"""The body that a pod gets: the client's own bytes, unless a field must differ for that pod."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from matrixinfer.errors import UNREADABLE, InvalidRequest
from matrixinfer.pods.registry import PodRegistry
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.fields import decode
from matrixinfer.prompt.openai import CHAT_PATH, COMPLETIONS_PATH

_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


class PodBody(NamedTuple):
    """What is sent to a pod."""

    bytes: bytes
    adds_usage: bool
    """It asks for a usage report that the client did not ask for, and must not see."""


class BodyRewriter:
    """Rewrites bodies for pods that know the model under another name.

    With `adds_usage`, streams that do not ask for a usage report are made to: it says how many tokens were cached.
    """

    def __init__(self, registry: PodRegistry, *, adds_usage: bool) -> None:
        self._registry = registry
        self._adds_usage = adds_usage

    def body_for(self, pod: str, prompt: Prompt, body: bytes) -> PodBody:
        """The body for the pod of that name; `body` itself when nothing must differ.

        Raises `InvalidRequest` if a field must differ in a body whose fields cannot be read: `prompt` was read from it,
        but keys that routing does not need need not be UTF-8.
        """
        name = self._registry.name_at(pod, prompt.model)
        may_add = self._adds_usage and prompt.stream and prompt.path in (CHAT_PATH, COMPLETIONS_PATH)
        if not may_add and name == prompt.model:
            return PodBody(body, adds_usage=False)
        try:
            fields = decode(_FIELDS, body)
        except InvalidRequest:
            if name != prompt.model:
                raise
            return PodBody(body, adds_usage=False)
        options = _with_usage(fields.get("stream_options")) if may_add else None
        if options is None and name == prompt.model:
            return PodBody(body, adds_usage=False)
        if options is not None:
            fields["stream_options"] = options
        fields["model"] = msgspec.Raw(msgspec.json.encode(name))
        return PodBody(msgspec.json.encode(fields), adds_usage=options is not None)


def _with_usage(options: msgspec.Raw | None) -> msgspec.Raw | None:
    """Change a request's `stream_options` to ask for usage once, at the end.

    None when they must stay: the client asks for usage itself, or the engine will refuse them.
    """
    given: dict[str, msgspec.Raw] = {}
    try:
        if options is not None and bytes(options) != b"null":
            given = decode(_FIELDS, options)
        asked = msgspec.json.decode(given.get("include_usage", b"null"))
    except (InvalidRequest, *UNREADABLE):
        return None
    if asked not in (None, False):
        return None
    kept = {key: value for key, value in given.items() if key != "continuous_usage_stats"}
    return msgspec.Raw(msgspec.json.encode(kept | {"include_usage": msgspec.Raw(b"true")}))
