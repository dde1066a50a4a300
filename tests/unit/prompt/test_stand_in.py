"""Where messages are in a body is guessed; a wrong guess changes nothing."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from matrixinfer.prompt import fields
from matrixinfer.prompt.openai import CHAT_PATH
from matrixinfer.prompt.requests import parse
from matrixinfer.prompt.stand_in import ITEM, LEAST_GUESSED, Span

from .test_read_chats import LONG, encoded, expected, outcome, said

PARTS = b'[{"role":"user","content":[{"type":"text","text":"hi"}]}]'


@pytest.mark.parametrize(
    ("body", "guessed"),
    [
        (b'{"model":"m","messages":[{"role":"user","content":"hi"}]}', True),
        (b'{"messages" : [ {"role":"user","content":"hi"} ] , "stream":true}', True),
        (b'{"messages":%b,"stream":true}' % PARTS, True),
        (b'{"tools":[{"type":"function","function":{"name":"f"}}],"messages":%b}' % PARTS, True),
        (b'{"messages":%b,"tools":[{"type":"function","function":{"name":"f"}}]}' % PARTS, False),
        (b'{"messages":%b,"stop":["a"]}' % PARTS, False),
        (b'{"messages":%b,"documents":[{"a":"b"}]}' % PARTS, True),
        (b'{"documents":[{"messages":[{"a":"b"}]}],"messages":%b}' % PARTS, True),
        (b'{"metadata":{"messages":%b},"messages":%b}' % (PARTS, PARTS), True),
        (b'{"messages":%b,"messages":%b}' % (PARTS, PARTS), True),
        (b'{"messages":%b,"\\u006dessages":[{"role":"b"}]}' % PARTS, True),
        (b'{"\\u006dessages":["the messages before these"],"x":{"messages":%b}}' % PARTS, True),
        (b'{"\\u006dessages":%b,"x":{"messages":%b}}' % (PARTS, PARTS), True),
        (b'{"\\u006dessages":%b}' % PARTS, False),
        (b'{"x":"\\"messages\\":[","messages":%b}' % PARTS, True),
        (b'{"x\\"messages":[],"messages":%b}' % PARTS, True),
        (b'{"x":"\\"}]","messages":[{"role":"\\"}]"}],"y":"]}],\\"\\"}]"}', True),
        (b'{"messages":%b,"y":"\\"}]}",":":"\\"}]"}' % PARTS, True),
        (b'{"messages":%b,"model":"\xff"}' % PARTS, True),
        (b'{"messages":[{"role":"\xff"}]}', True),
        (b'{"messages":[{"role":1,"a":"b"},"x",{"a":"b"}]}', True),
        (b'{"messages":[{"role":"user","content":"hi"}],}', True),
        (b'{"messages":[{"role":"user","content":"hi"}]', True),
        (b'{"messages":[{"role":"user","content":"hi"}]}}', True),
        (b'{"messages":[{"a":"b"}],"messages":null}', True),
        (b'{"messages":[]}', False),
        (b'{"messages":["the messages before these"]}', False),
        (b'{"messages":', False),
        (b"]", False),
        (b"", False),
    ],
)
def test_where_messages_are_is_guessed_but_never_believed(body: bytes, guessed: bool) -> None:
    assert outcome(body, None) == expected(body)
    for text in (b"x" * LEAST_GUESSED, b'\\"' * LEAST_GUESSED):
        long = body.replace(b"{", b'{"n":"%b",' % text, 1)
        assert (Span.guessed(long) is not None) == guessed
        assert outcome(long, None) == expected(long)


@pytest.mark.parametrize("tail", [b"}", b',"stream":true}'])
def test_a_chat_is_decoded_once(monkeypatch: pytest.MonkeyPatch, tail: bytes) -> None:
    decoded: list[int] = []
    decode = fields.decode

    def noting(decoder: Any, data: Any, *place: Any) -> Any:
        decoded.append(memoryview(data).nbytes)
        return decode(decoder, data, *place)

    monkeypatch.setattr(fields, "decode", noting)
    body = encoded(said(LONG, "x"))[:-1] + tail
    parse(CHAT_PATH, body)
    assert sum(decoded) < len(body) + 100


def test_the_item_is_valid_json() -> None:
    assert msgspec.json.decode(ITEM) == "the messages before these"
    assert len(ITEM) == len('{"role":"user","name":"12"}')
