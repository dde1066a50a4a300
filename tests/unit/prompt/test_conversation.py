"""Tests how messages are reshaped before the template is rendered.

`vllm_conversations.jsonl` has messages, and what the request schema and `chat_utils` of vLLM 0.32 turn them into for
templates that take strings and for templates that take parts; with `"developers": false` for a template that does not
know the role `developer`.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.errors import TokenizeError
from matrixinfer.prompt.conversation import engine_messages, engine_tools, has_media, without_developers

TEXT_PARTS = [{"type": "text", "text": "a"}, "b", {"type": "refusal", "refusal": "c"}, {"type": "text", "text": None}]

GOLDEN = [
    json.loads(line) for line in Path(__file__).with_name("vllm_conversations.jsonl").read_text("utf-8").splitlines()
]


@pytest.mark.parametrize("case", GOLDEN, ids=map(str, range(len(GOLDEN))))
@pytest.mark.parametrize("form", ["string", "parts"])
def test_messages_are_reshaped_as_in_vllm(case: dict[str, Any], form: str) -> None:
    shaped = engine_messages(case["messages"], parts=form == "parts")
    if not case.get("developers", True):
        shaped = without_developers(shaped)
    assert json.dumps(shaped) == json.dumps(case[form])


def one(message: dict[str, Any], *, parts: bool = False) -> dict[str, Any]:
    (shaped,) = engine_messages([message], parts=parts)
    return shaped


@pytest.mark.parametrize(
    ("content", "string", "listed"),
    [
        (None, "", []),
        ("x", "x", ["x"]),
        ("", "", [""]),
        (TEXT_PARTS, "a\nb\nc", ["a", "b", "c"]),
        ([], "", []),
        ([{"type": "text", "text": "a"}, ""], "a", ["a", ""]),
    ],
)
def test_content_becomes_one_string_or_text_parts(content: Any, string: str, listed: list[str]) -> None:
    message = {"role": "user", "content": content}
    assert one(message) == {"role": "user", "content": string}
    assert one(message, parts=True) == {"role": "user", "content": [{"type": "text", "text": t} for t in listed]}


def test_the_result_of_a_tool_is_always_a_string() -> None:
    message = {"role": "tool", "tool_call_id": "7", "content": TEXT_PARTS}
    for parts in (False, True):
        assert one(message, parts=parts) == {"role": "tool", "content": "a\nb\nc", "tool_call_id": "7"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"b": 1, "a": "ü"}', {"b": 1, "a": "ü"}),
        ({"x": 1}, {"x": 1}),
        ("", {}),
        (None, {}),
        ("[1]", {}),
        ("{oops", {}),
    ],
)
def test_arguments_of_a_tool_call_become_an_object(arguments: Any, expected: dict[str, Any]) -> None:
    call = {"type": "function", "index": 0, "id": "7", "function": {"name": "f", "arguments": arguments}}
    shaped = one({"role": "assistant", "tool_calls": [call]})["tool_calls"]
    assert shaped == [{"id": "7", "function": {"arguments": expected, "name": "f"}, "type": "function", "index": 0}]
    assert (list(shaped[0]), list(shaped[0]["function"])) == (
        ["id", "function", "type", "index"],
        ["arguments", "name"],
    )
    assert call["function"] == {"name": "f", "arguments": arguments}


def test_tool_calls_built_by_the_engine_keep_the_order_of_their_keys() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    (shaped,) = engine_messages([{"role": "assistant", "tool_calls": [call]}], parts=False, in_schema_order=False)
    assert json.dumps(shaped["tool_calls"]) == '[{"type": "function", "function": {"name": "f", "arguments": {}}}]'


def test_an_empty_list_of_tool_calls_is_dropped() -> None:
    assert "tool_calls" not in one({"role": "assistant", "content": "x", "tool_calls": []})


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
def test_reasoning_gets_both_names(key: str) -> None:
    shaped = one({"role": "assistant", "content": "x", key: "because"})
    assert (shaped["reasoning"], shaped["reasoning_content"]) == ("because", "because")


def test_fields_that_the_engine_drops_do_not_reach_the_template() -> None:
    message: dict[str, Any] = {
        "role": "user",
        "content": "x",
        "name": "n",
        "refusal": None,
        "annotations": [],
        "name2": 1,
    }
    assert one(message) == {"role": "user", "content": "x", "name": "n"}


HEADER = "x-anthropic-billing-header: cch=1"


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (f"{HEADER}\nYou are\nhelpful", ["You are\nhelpful"]),
        (HEADER, []),
        ([HEADER, {"type": "text", "text": f"{HEADER}\nb"}, "c"], ["b", "c"]),
        (f"You are\n{HEADER}", [f"You are\n{HEADER}"]),
    ],
)
def test_a_system_message_loses_its_billing_header(content: Any, texts: list[str]) -> None:
    message = {"role": "system", "content": content}
    assert one(message)["content"] == "\n".join(texts)
    assert one(message, parts=True)["content"] == [{"type": "text", "text": text} for text in texts]


def test_other_messages_keep_a_line_that_looks_like_a_billing_header() -> None:
    for role in ("user", "developer"):
        assert one({"role": role, "content": HEADER})["content"] == HEADER


SYSTEM = {"role": "system", "content": "s"}
DEVELOPER = {"role": "developer", "content": "d", "name": "n", "tools": None}
USER = {"role": "user", "content": "u"}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([SYSTEM, USER, SYSTEM], [SYSTEM, USER, SYSTEM]),
        ([DEVELOPER, USER], [{"role": "system", "content": "d", "name": "n"}, USER]),
        ([USER, DEVELOPER], [{"role": "system", "content": "d"}, USER]),
        ([SYSTEM, DEVELOPER, USER], [{"role": "system", "content": "s\n\nd"}, USER]),
        ([SYSTEM, {**DEVELOPER, "content": ""}, USER], [SYSTEM, USER]),
        (
            [{"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, DEVELOPER],
            [{"role": "system", "content": "a\nb\n\nd"}],
        ),
    ],
)
def test_developer_messages_become_one_system_message(
    messages: list[dict[str, Any]], expected: list[dict[str, Any]]
) -> None:
    assert without_developers(messages) == expected
    assert DEVELOPER["role"] == "developer"


def test_tools_have_their_keys_in_the_order_of_the_schema() -> None:
    tool = {
        "function": {"defer_loading": False, "strict": True, "parameters": {"b": 1, "a": 2}, "name": "f", "x": 1},
        "type": "function",
        "y": 2,
    }
    assert json.dumps(engine_tools([tool])) == json.dumps(
        [
            {
                "type": "function",
                "function": {
                    "name": "f",
                    "description": None,
                    "parameters": {"b": 1, "a": 2},
                    "strict": True,
                    "defer_loading": False,
                },
            }
        ]
    )
    (deferred,) = engine_tools([{"function": {"name": "f"}, "defer_loading": True}]) or []
    assert list(deferred) == ["type", "function", "defer_loading"]
    assert deferred["function"]["defer_loading"] is True
    assert engine_tools(None) is None
    assert engine_tools([]) == []


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": [{"type": ["text"], "text": "x"}]},
        {"role": "user", "content": [3]},
        {"role": "user", "content": 3},
        {"role": "user", "content": [{"type": "text", "text": 3}]},
        {"role": "user", "content": [{"type": "text", "text": "x", "uuid": "u"}]},
        {"role": "assistant", "tool_calls": 3},
        {"role": "assistant", "tool_calls": [3]},
        {"role": "assistant", "tool_calls": [{"function": 3}]},
    ],
)
def test_content_that_is_not_text_is_an_error(message: dict[str, Any]) -> None:
    with pytest.raises(TokenizeError):
        one(message)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["user", "system", "developer", "tool", "assistant"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "function"]), inner),
    max_leaves=8,
)
MESSAGE_KEYS = ["role", "content", "name", "tool_calls", "tool_call_id", "reasoning", "tools", "task"]


@given(st.lists(st.dictionaries(st.sampled_from(MESSAGE_KEYS), JSON), max_size=3), st.booleans())
def test_only_tokenize_errors_are_raised(messages: list[dict[str, Any]], parts: bool) -> None:
    has_media(messages)
    with suppress(TokenizeError):
        without_developers(engine_messages(messages, parts=parts))
    with suppress(TokenizeError):
        engine_tools(messages)


def test_a_tool_without_a_function_is_an_error() -> None:
    with pytest.raises(TokenizeError):
        engine_tools([{"type": "custom", "custom": {}}])


@pytest.mark.parametrize(
    ("content", "media"),
    [
        ("x", False),
        (None, False),
        (TEXT_PARTS, False),
        ([{"type": "tool_reference", "name": "f"}], False),
        ([{"text": "x"}], True),
        ([{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}], True),
        ([{"image_url": "x"}], True),
    ],
)
def test_media_is_detected(content: Any, media: bool) -> None:
    assert has_media([{"role": "user", "content": "x"}, {"role": "user", "content": content}]) is media
