"""Reads requests that bring no prompt to route by: only the model that they name, and what else a route may ask for.

Whatever else is in the body is the engine's to judge, so nothing here refuses a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import parse_qs

import msgspec

from matrixinfer.errors import UNREADABLE, InvalidRequest
from matrixinfer.prompt import forms
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.fields import top_level

_MAX_NAME = 1024
_URLENCODED = "application/x-www-form-urlencoded"


class _Named(msgspec.Struct):
    model: str | None = None


_NAMED = msgspec.json.Decoder(_Named)


def read(path: str, body: bytes, content_type: str = "", query: Mapping[str, str] | None = None) -> Prompt:
    """A request to a path without a prompt. The model may be named in JSON, in a form, or in the query."""
    named, in_query = _model(body, content_type), (query or {}).get("model")
    model = named or in_query or ""
    # Engines do not look into the query for it.
    is_sure = not body or (_is_plain(body, content_type) and len(model) <= _MAX_NAME and bool(named or not in_query))
    return opaque(path, len(body), model=model if len(model) <= _MAX_NAME else "", names_surely=is_sure)


def opaque(
    path: str, size: int, *, model: str = "", response_id: str | None = None, names_surely: bool = True
) -> Prompt:
    """A request without a prompt, perhaps about a response that an engine stores."""
    return Prompt(
        path=path,
        model=model,
        names_model=bool(model),
        names_surely=names_surely,
        stream=False,
        chat=None,
        text=None,
        token_ids=None,
        add_special_tokens=False,
        cache_salt=None,
        size=size,
        prefix=b"",
        inexact="the request brings no prompt",
        reads_cache=False,
        counted=False,
        opaque=True,
        response_id=response_id,
    )


def with_model(body: bytes, model: str) -> bytes:
    """The body with another name of the model, if it names one in JSON or in a form."""
    if body.startswith(b"--"):
        return forms.with_field(body, "model", model)
    try:
        fields = top_level(body)
    except InvalidRequest:
        return body
    if "model" not in fields:
        return body
    fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(fields)


def _model(body: bytes, content_type: str) -> str | None:
    kind = content_type.partition(";")[0].strip().lower()
    if kind == forms.MULTIPART:
        return forms.field(body, "model")
    if kind == _URLENCODED:
        if len(body) > _MAX_NAME * 64:
            return None
        return next(iter(parse_qs(body.decode("utf-8", "replace"), max_num_fields=None).get("model", ())), None)
    try:
        return _NAMED.decode(body).model
    except UNREADABLE:
        return None


def _is_plain(body: bytes, content_type: str) -> bool:
    """Whether everybody who can read the body at all reads the same model in it."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == forms.MULTIPART:
        return forms.is_plain(body, content_type, once="model")
    try:
        _NAMED.decode(body)
    except UNREADABLE:
        return False
    return kind != _URLENCODED
