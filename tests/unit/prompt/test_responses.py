from __future__ import annotations

import json
from typing import Any

import pytest

from matrixinfer.errors import InvalidRequest
from matrixinfer.prompt.base import Chat, Prompt
from matrixinfer.prompt.requests import parse

PATH = "/v1/responses"


def response(value: Any = "hello", **fields: Any) -> Prompt:
    return parse(PATH, json.dumps({"model": "m", "input": value} | fields).encode())


def chat_of(value: Any = "hello", **fields: Any) -> Chat:
    chat = response(value, **fields).chat
    assert chat is not None
    return chat


def answer(text: str, **fields: Any) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]} | fields


CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
THOUGHT = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "because"}]}


def test_a_text_becomes_a_user_message_after_the_instructions() -> None:
    prompt = response("hello", instructions="be nice", stream=True, cache_salt="s")
    assert prompt.chat is not None
    assert prompt.chat.messages == [{"role": "system", "content": "be nice"}, {"role": "user", "content": "hello"}]
    assert (prompt.chat.tools, prompt.chat.add_generation_prompt) == (None, True)
    assert (prompt.stream, prompt.cache_salt, prompt.counted, prompt.reads_cache) == (True, "s", True, True)


def test_the_tokenizer_adds_its_special_tokens() -> None:
    assert response().add_special_tokens


def test_reasoning_text_and_calls_of_one_answer_become_one_message() -> None:
    messages = chat_of(
        [{"role": "user", "content": "x"}, THOUGHT, answer("on it"), CALL, CALL | {"name": "g"}]
    ).messages
    assert messages == [
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "reasoning": "because",
            "content": "on it",
            "tool_calls": [
                {"id": "1", "function": {"name": "f", "arguments": "{}"}, "type": "function"},
                {"id": "1", "function": {"name": "g", "arguments": "{}"}, "type": "function"},
            ],
        },
    ]


def test_a_second_text_starts_another_assistant_message() -> None:
    messages = chat_of([answer("a"), answer("b"), THOUGHT, THOUGHT]).messages
    assert [message.get("content") for message in messages] == ["a", "b", None]
    assert [message.get("reasoning") for message in messages] == [None, "because", "because"]


def test_items_are_not_merged_into_the_instructions() -> None:
    assert [message["role"] for message in chat_of([CALL], instructions="x").messages] == ["system", "assistant"]


@pytest.mark.parametrize("status", ["in_progress", "incomplete"])
def test_an_unfinished_answer_is_continued(status: str) -> None:
    chat = chat_of([answer("a", status=status)])
    assert (chat.continue_final_message, chat.add_generation_prompt) == (True, False)
    assert not chat_of([answer("a", status=status), {"role": "user", "content": "x"}]).continue_final_message


@pytest.mark.parametrize(
    ("value", "fields"),
    [
        ("x", {"previous_response_id": "resp_1"}),
        ("x", {"previous_input_messages": []}),
        ([{"type": "item_reference", "id": "x"}], {}),
        ([{"type": "reasoning", "summary": [], "encrypted_content": "x"}], {}),
        ([], {}),
    ],
)
def test_prompts_that_depend_on_the_engine_are_inexact(value: Any, fields: dict[str, Any]) -> None:
    prompt = response(value, **fields)
    assert prompt.inexact
    assert prompt.chat is None


def test_the_prefix_is_tools_instructions_and_input_as_sent() -> None:
    body = b'{"model":"m","input": [ ],"instructions":"be","tools":[ {"type":"x"}]}'
    assert parse(PATH, body).prefix == b'[ {"type":"x"}]be[ ]'


def test_tools_that_run_in_the_engine_are_not_shown() -> None:
    assert chat_of(tools=[{"type": "web_search"}]).tools == []
    assert chat_of(tools=[]).tools is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"model":"m"}', "input"),
        (b'{"model":"m","input":3}', "input"),
        (b'{"model":"m","input":["x"]}', "input[0]"),
        (b'{"model":"m","input":"x","tools":["x"]}', "tools[0]"),
        (b'{"model":"m","input":"x","reasoning":{"effort":1}}', "reasoning.effort"),
    ],
)
def test_a_bad_request_names_the_field_at_fault(body: bytes, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(PATH, body)
    assert caught.value.param == param
