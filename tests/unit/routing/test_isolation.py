"""What a body may not ask for where tenants are kept apart, however it is spelled, and what looking for it may cost."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest

from matrixinfer.errors import InvalidRequest
from matrixinfer.prompt import fields
from matrixinfer.prompt.requests import READERS
from matrixinfer.routing import isolation
from matrixinfer.routing.isolation import salted

CHAT = "/v1/chat/completions"
PAST = ["kv_transfer_params", "ec_transfer_params", "features", "bootstrap_host", "bootstrap_room", "session_params"]


def salt(body: bytes) -> dict[str, Any]:
    prompt = READERS[CHAT](CHAT, b'{"model":"m","messages":[{"role":"user","content":"x"}]}')
    changed: dict[str, Any] = json.loads(salted(prompt, body, "s")[1])
    return changed


def chat(message: bytes, more: bytes = b"") -> bytes:
    return b'{"model":"m","messages":[%b]%b}' % (message, more)


@pytest.mark.parametrize("field", PAST)
@pytest.mark.parametrize("escapes", [0, 1, 3])
def test_fields_past_the_salt_are_refused_however_they_are_spelled(field: str, escapes: int) -> None:
    name = "".join(rf"\u{ord(each):04x}" for each in field[:escapes]) + field[escapes:]
    message = b'{"role":"user","content":"x"}'
    with pytest.raises(InvalidRequest, match=field):
        salt(chat(message, b',"%b":{"a":1}' % name.encode()))
    assert salt(chat(message, b',"%b":null' % name.encode()))["cache_salt"] == "s"


SPELLED = list(product(("u", r"\u0075"), ("u", r"\u0075"), ("i", r"\u0069"), ("d", r"\u0064")))


@pytest.mark.parametrize("spelled", SPELLED, ids="".join)
def test_media_named_by_the_client_are_refused_however_that_is_spelled(
    spelled: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "_PIECE", 8)
    for before in range(12):
        part = b'{"type":"image_url","%b":"mine"}' % "".join(spelled).encode()
        text = b'{"type":"text","text":"%b"}' % (b"x" * before)
        with pytest.raises(InvalidRequest, match="uuid"):
            salt(chat(b'{"role":"user","content":[%b,%b]}' % (text, part)))


@pytest.mark.parametrize(
    "message",
    [
        b'{"role":"user","content":[{"type":"image_url","uuid":null}]}',
        b'{"role":"user","content":"say \\"uuid\\": \\u00e9"}',
        b'{"role":"user","content":"\\u0041","name":"uuid"}',
    ],
)
def test_others_pass(message: bytes) -> None:
    assert salt(chat(message))["cache_salt"] == "s"


def test_many_parts_are_decoded_only_if_they_may_name_media(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_MOST_PARTS", 100)
    monkeypatch.setattr(isolation, "_ANY", None)
    parts = b",".join([b"{}"] * 200)
    assert salt(chat(b'{"role":"user","content":[%b,{"text":"\\u0041"}]}' % parts))["cache_salt"] == "s"
    with pytest.raises(InvalidRequest, match="uuid"):
        salt(chat(b'{"role":"user","content":[%b,{"uuid":"x"}]}' % parts))


def test_the_salt_of_the_client_is_replaced_unless_the_body_has_too_many_fields(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    body = chat(b'{"role":"user","content":"x"}', b',"cache_salt":"mine","a":1,"b":2')
    assert salt(body)["cache_salt"] == "s"
    assert salted(READERS[CHAT](CHAT, body), body, "s")[1].count(b"cache_salt") == 1
    monkeypatch.setattr(fields, "MOST_FIELDS", 5)
    with pytest.raises(InvalidRequest, match="too many fields"):
        salt(body)
