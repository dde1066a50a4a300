from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from matrixinfer.errors import InvalidRequest
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.openai import CHAT_PATH, COMPLETIONS_PATH
from matrixinfer.prompt.requests import parse

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


@pytest.mark.parametrize(
    ("prompt", "more"),
    [
        ("x", (0, 0)),
        (["x"], (0, 0)),
        ([1, 2], (0, 0)),
        ([[1, 2]], (0, 0)),
        (["x", "héllo", "abc"], (6 + 3, 0)),
        ([[1, 2], [3], [4, 5, 6]], (0, 4)),
    ],
)
def test_the_size_of_further_prompts_is_known(prompt: Any, more: tuple[int, int]) -> None:
    parsed = completion(prompt)
    assert (parsed.more_bytes, parsed.more_tokens) == more


def test_special_tokens_can_be_turned_on_and_off() -> None:
    assert chat(add_special_tokens=True).add_special_tokens
    assert not completion("x", add_special_tokens=False).add_special_tokens


@pytest.mark.parametrize(
    "prompt", [[True], [-1], [2**32], [1.5], [1, "a"], ["a", None], [[1], None], [], [[]], {}, None, 3, [[True]]]
)
def test_an_invalid_prompt_is_refused(prompt: Any) -> None:
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
        (CHAT_PATH, b'{"model":1,"messages":[{}]}', "model"),
        (CHAT_PATH, b'{"model":"m","messages":[{}],"tools":{}}', "tools"),
        (CHAT_PATH, b'{"model":"m","messages":[{}],"tools":["x"]}', "tools[0]"),
        (CHAT_PATH, b'{"model":"m","messages":[{}],"stream":"yes"}', "stream"),
        (CHAT_PATH, b'{"model":"m","messages":[{}],"chat_template_kwargs":[]}', "chat_template_kwargs"),
        (COMPLETIONS_PATH, b'{"model":"m"}', "prompt"),
        (CHAT_PATH, b'{"model":"m","messages":[{}],"kv_transfer_params":1}', "kv_transfer_params"),
        (COMPLETIONS_PATH, b'{"model":"m","prompt":"x","truncate_prompt_tokens":"many"}', "truncate_prompt_tokens"),
    ],
)
def test_a_bad_request_names_the_field_at_fault(path: str, body: bytes, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(path, body)
    assert caught.value.param == param
    assert caught.value.message


@pytest.mark.parametrize("model", ["", '"model":null,', '"model":"",'])
def test_a_request_may_name_no_model(model: str) -> None:
    prompt = parse(CHAT_PATH, f'{{{model}"messages":[{{"role":"user","content":"x"}}]}}'.encode())
    assert (prompt.model, prompt.names_model) == ("", False)
    assert parse(CHAT_PATH, b'{"model":"m","messages":[{"role":"user","content":"x"}]}').names_model


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


def test_variables_that_are_null_or_auto_do_not_reach_the_template() -> None:
    prompt = chat(
        chat_template_kwargs={"a": None, "b": "auto", "c": 0, "enable_thinking": None}, reasoning_effort="low"
    )
    assert prompt.chat is not None
    assert prompt.chat.chat_template_kwargs == {"c": 0, "reasoning_effort": "low"}
    prompt = chat(chat_template_kwargs={"a": None})
    assert prompt.chat is not None
    assert prompt.chat.chat_template_kwargs is None


@pytest.mark.parametrize(
    ("fields", "reads"),
    [
        ({}, True),
        ({"prompt_logprobs": None, "logprobs": True, "top_logprobs": 2}, True),
        ({"prompt_logprobs": 0}, False),
        ({"prompt_logprobs": 3}, False),
        ({"echo": True}, False),
    ],
)
def test_a_chat_with_prompt_log_probabilities_does_not_read_the_cache(fields: dict[str, Any], reads: bool) -> None:
    assert chat(**fields).reads_cache is reads


@pytest.mark.parametrize(
    ("fields", "reads"),
    [
        ({"logprobs": 3}, True),
        ({"echo": True}, True),
        ({"echo": True, "logprobs": 0}, False),
        ({"prompt_logprobs": 1}, False),
    ],
)
def test_a_completion_that_echoes_log_probabilities_does_not_read_the_cache(
    fields: dict[str, Any], reads: bool
) -> None:
    assert completion("x", **fields).reads_cache is reads


@pytest.mark.parametrize(
    ("prompt", "alone"), [("x", True), (["x"], True), (["x", "y"], False), ([1, 2], True), ([[1], [2]], False)]
)
def test_usage_is_not_comparable_for_several_prompts(prompt: Any, alone: bool) -> None:
    assert completion(prompt).counted is alone


@pytest.mark.parametrize(
    ("fields", "last", "first"),
    [
        ({"truncate_prompt_tokens": 8}, 8, None),
        ({"truncate_prompt_tokens": 8, "truncation_side": "left"}, 8, None),
        ({"truncate_prompt_tokens": 8, "truncation_side": "right"}, None, 8),
        ({"truncate_prompt_tokens": -1}, None, None),
        ({"truncate_prompt_tokens": 0}, None, None),
        ({"truncation_side": "left"}, None, None),
    ],
)
def test_a_truncated_prompt_keeps_its_end(fields: dict[str, Any], last: int | None, first: int | None) -> None:
    for prompt in (
        chat(**fields),
        completion([1, 2, 3], **fields),
        completion("x", add_special_tokens=False, **fields),
    ):
        assert (prompt.keep_last, prompt.keep_first, prompt.inexact) == (last, first, None)


def test_truncation_of_a_text_with_special_tokens_is_inexact_unless_a_side_is_named() -> None:
    assert completion("x", truncate_prompt_tokens=8).inexact is not None
    assert completion("x", truncate_prompt_tokens=8, truncation_side="left").inexact is None


@pytest.mark.parametrize(
    ("prompt", "prefix"),
    [
        (completion(None, prompt_embeds="AAAA"), b'"AAAA"'),
        (completion("x", prompt_embeds=["AAAA"]), b'["AAAA"]'),
        (completion("x", suffix="y"), b"x"),
        (chat(kv_transfer_params={"prompt_token_ids": [1]}), json.dumps(HELLO).encode()),
        (chat(chat_template_kwargs={"tools": []}), json.dumps(HELLO).encode()),
    ],
)
def test_a_prompt_that_only_the_engine_can_tokenize_is_inexact(prompt: Prompt, prefix: bytes) -> None:
    assert prompt.inexact
    assert (prompt.chat, prompt.text, prompt.token_ids) == (None, None, None)
    assert prompt.prefix == prefix


def test_a_long_chat_is_read_like_a_short_one() -> None:
    long: list[Any] = [{"role": "user", "content": "é" * 200_000}, {"content": None, "role": "assistant"}]
    prompt = parse(CHAT_PATH, json.dumps({"model": "m", "messages": long}).encode())
    assert prompt.chat is not None
    assert prompt.chat.messages == long
    assert list(prompt.chat.messages[1]) == ["content", "role"]


@pytest.mark.parametrize("wrong", ["text", None, 5])
def test_errors_in_a_long_chat_are_the_same_as_in_a_short_one(wrong: object) -> None:
    errors = []
    for text in ("short", "é" * 200_000):
        messages = [{"role": "user", "content": text}, wrong]
        with pytest.raises(InvalidRequest) as refused:
            parse(CHAT_PATH, json.dumps({"model": "m", "messages": messages}).encode())
        errors.append((refused.value.message, refused.value.param))
    assert errors[0] == errors[1]
    assert errors[0][1] == "messages[1]"
