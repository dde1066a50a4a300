"""Token ids that a chat brings along for vLLM to use in place of its messages: `kv_transfer_params.prompt_token_ids`.

vLLM takes them since 0.27. It renders the messages all the same where these have media, or where `echo` needs them.
"""

from __future__ import annotations

import msgspec
import numpy as np

from matrixinfer.blocks import TokenIds
from matrixinfer.errors import UNREADABLE, InvalidRequest

_FIELD = "kv_transfer_params"
_IDS = "prompt_token_ids"
_MOST = 0xFFFF_FFFF


class _Options(msgspec.Struct):
    echo: bool | None = None
    kv_transfer_params: dict[str, msgspec.Raw] | None = None


_OPTIONS = msgspec.json.Decoder(_Options)
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


def without_ids(body: bytes) -> bytes:
    """A chat's body without the token ids that it brings."""
    if _IDS.encode() not in body:
        return body
    try:
        fields = _FIELDS.decode(body)
        given = _FIELDS.decode(fields.get(_FIELD, msgspec.Raw(b"{}")))
    except UNREADABLE:
        return body
    kept = msgspec.json.encode({name: value for name, value in given.items() if name != _IDS})
    return msgspec.json.encode({**fields, _FIELD: msgspec.Raw(kept)})


def forwarded_ids(body: bytes) -> TokenIds | None:
    """The token ids that a chat without media brings, if the engine uses them. Raises `InvalidRequest`."""
    if _IDS.encode() not in body:
        return None
    options = _OPTIONS.decode(body)
    given = (options.kv_transfer_params or {}).get(_IDS)
    if options.echo or given is None or bytes(given) == b"null":
        return None
    try:
        ids = msgspec.json.decode(given, type=list[int])
    except UNREADABLE:
        ids = []
    if not ids or min(ids) < 0 or max(ids) > _MOST:
        raise InvalidRequest(
            f"`{_FIELD}['{_IDS}']` must be a non-empty list of non-negative integers.", param=f"{_FIELD}.{_IDS}"
        )
    return np.array(ids, dtype=np.uint32)
