from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.errors import InvalidRequest
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.openai import CHAT_PATH, COMPLETIONS_PATH, parse

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> Prompt:
    return parse(CHAT_PATH, json.dumps({"model": "m", "messages": HELLO} | fields).encode())


def completion(prompt: Any, **fields: Any) -> Prompt:
    return parse(COMPLETIONS_PATH, json.dumps({"model": "m", "prompt": prompt} | fields).encode())


def test_a_chat_has_the_defaults_of_the_engine() -> None:
    prompt = chat()
    assert prompt.chat is not None
    assert prompt.chat.messages == HELLO
    assert prompt.chat.add_generation_prompt
    assert not prompt.chat.continue_final_message
    assert not prompt.chat.own_template
    assert (prompt.chat.tools, prompt.chat.documents, prompt.chat.chat_template_kwargs) == (None, None, None)
    assert (prompt.model, prompt.path, prompt.stream) == ("m", CHAT_PATH, False)
    assert (prompt.text, prompt.token_ids, prompt.cache_salt) == (None, None, None)
    assert not prompt.add_special_tokens


def test_null_is_the_same_as_absent() -> None:
    names = ("tools", "documents", "stream", "cache_salt", "add_generation_prompt", "chat_template", "reasoning_effort")
    prompt = chat(**dict.fromkeys(names))
    assert prompt.chat is not None
    assert prompt.chat.add_generation_prompt
    assert prompt.chat.tools is None
    assert prompt.prefix == json.dumps(HELLO).encode()


def test_messages_keep_the_order_of_their_keys() -> None:
    body = b'{"model":"m","messages":[{"content":"x","name":"n","role":"user","a":1}]}'
    prompt = parse(CHAT_PATH, body)
    assert prompt.chat is not None
    assert list(prompt.chat.messages[0]) == ["content", "name", "role", "a"]


def test_the_prefix_of_a_chat_is_the_json_of_its_tools_and_messages_as_sent() -> None:
    body = b'{"messages": [ {"role":"user","content":"x"} ], "model":"m","tools":[{"type": "function"}],"top_k":1}'
    assert parse(CHAT_PATH, body).prefix == b'[{"type": "function"}][ {"role":"user","content":"x"} ]'


def test_a_template_in_the_request_is_its_own() -> None:
    prompt = chat(chat_template="{{ messages }}", chat_template_kwargs={"a": 1})
    assert prompt.chat is not None
    assert prompt.chat.own_template
    assert prompt.chat.chat_template_kwargs == {"a": 1}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"reasoning_effort": "low"}, {"enable_thinking": True, "reasoning_effort": "low"}),
        ({"reasoning_effort": "none"}, {"enable_thinking": False, "reasoning_effort": "none"}),
        (
            {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "low"}},
            {"enable_thinking": False, "reasoning_effort": "high"},
        ),
    ],
)
def test_the_reasoning_effort_reaches_the_template(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    prompt = chat(**fields)
    assert prompt.chat is not None
    assert prompt.chat.chat_template_kwargs == expected


@pytest.mark.parametrize("prompt", ["héllo", ["héllo", "other"]])
def test_the_first_text_decides(prompt: Any) -> None:
    parsed = completion(prompt, stream=True, cache_salt="s")
    assert (parsed.text, parsed.chat, parsed.token_ids) == ("héllo", None, None)
    assert parsed.prefix == "héllo".encode()
    assert (parsed.stream, parsed.cache_salt, parsed.add_special_tokens) == (True, "s", True)


@pytest.mark.parametrize("prompt", [[1, 2, 2**32 - 1], [[1, 2, 2**32 - 1], [7]]])
def test_the_first_list_of_token_ids_decides(prompt: Any) -> None:
    parsed = completion(prompt)
    assert parsed.token_ids is not None
    assert parsed.token_ids.dtype == np.uint32
    assert parsed.token_ids.tolist() == [1, 2, 2**32 - 1]
    assert parsed.prefix == b"[1,2,4294967295]"
    assert parsed.text is None


def test_special_tokens_can_be_asked_for_and_declined() -> None:
    assert chat(add_special_tokens=True).add_special_tokens
    assert not completion("x", add_special_tokens=False).add_special_tokens


@pytest.mark.parametrize(
    "prompt", [[True], [-1], [2**32], [1.5], [1, "a"], ["a", None], [[1], None], [], [[]], {}, None, 3, [[True]]]
)
def test_what_is_no_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion(prompt)
    assert caught.value.param is not None
    assert caught.value.param.startswith("prompt")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT_PATH, b"{", None),
        (CHAT_PATH, b"", None),
        (CHAT_PATH, b"[]", None),
        (CHAT_PATH, b'{"model":"m","messages":[]}', "messages"),
        (CHAT_PATH, b'{"model":"m","messages":{}}', "messages"),
        (CHAT_PATH, b'{"model":"m","messages":["x"]}', "messages[0]"),
        (CHAT_PATH, b'{"model":"m","messages":null}', "messages"),
        (CHAT_PATH, b'{"model":"m"}', "messages"),
        (CHAT_PATH, b'{"messages":[{}]}', "model"),
        (CHAT_PATH, b'{"model":1,"messages":[{}]}', "model"),
        (CHAT_PATH, b'{"model":"m","messages":[{}],"tools":{}}', "tools"),
        (CHAT_PATH, b'{"model":"m","messages":[{}],"tools":["x"]}', "tools[0]"),
        (CHAT_PATH, b'{"model":"m","messages":[{}],"stream":"yes"}', "stream"),
        (CHAT_PATH, b'{"model":"m","messages":[{}],"chat_template_kwargs":[]}', "chat_template_kwargs"),
        (COMPLETIONS_PATH, b'{"model":"m"}', "prompt"),
        (COMPLETIONS_PATH, b'{"prompt":"m"}', "model"),
        ("/v1/embeddings", b"{}", None),
    ],
)
def test_a_bad_request_names_the_field_at_fault(path: str, body: bytes, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(path, body)
    assert caught.value.param == param
    assert caught.value.message


def test_bytes_that_are_not_utf8_are_refused() -> None:
    for body in (b'{"model":"m","messages":[{"content":"\xff"}]}', b'{"model":"\xff","messages":[{}]}'):
        with pytest.raises(InvalidRequest):
            parse(CHAT_PATH, body)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        parse(CHAT_PATH, b'{"model":"m","messages":[{"content":"\\ud800 alone"}]}')


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="nested"):
        parse(CHAT_PATH, b'{"model":"m","messages":' + b"[" * 50_000 + b"]" * 50_000 + b"}")


@given(st.binary(max_size=60))
def test_no_body_raises_anything_but_an_invalid_request(junk: bytes) -> None:
    for body in (junk, b'{"model":"m","messages":' + junk + b"}", b'{"model":"m","prompt":' + junk + b"}"):
        for path in (CHAT_PATH, COMPLETIONS_PATH):
            try:
                parse(path, body)
            except InvalidRequest as error:
                assert error.message  # noqa: PT017 - that no other error comes is the point
