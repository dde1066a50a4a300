from __future__ import annotations

import json
from typing import Any

import pytest

from matrixinfer.errors import InvalidRequest, TokenizeError
from matrixinfer.prompt.anthropic import COUNT_PATH, MESSAGES_PATH
from matrixinfer.prompt.base import Chat, Prompt
from matrixinfer.prompt.chat_template import ChatTemplate
from matrixinfer.prompt.requests import parse
from matrixinfer.prompt.template_traits import TemplateTraits, adapt, probe

HELLO = {"role": "user", "content": "hello"}
TOOL = {"name": "f", "input_schema": {"properties": {}}}


def message(*messages: dict[str, Any], path: str = MESSAGES_PATH, **fields: Any) -> Prompt:
    body = {"model": "m", "max_tokens": 5, "messages": list(messages) or [HELLO]} | fields
    return parse(path, json.dumps(body).encode())


def chat_of(*messages: dict[str, Any], **fields: Any) -> Chat:
    chat = message(*messages, **fields).chat
    assert chat is not None
    return chat


def test_a_request_without_blocks_is_the_same_chat_after_its_system_prompt() -> None:
    prompt = message(HELLO, system="be nice", stream=True, cache_salt="s")
    assert prompt.chat is not None
    assert prompt.chat.messages == [{"role": "system", "content": "be nice"}, HELLO]
    assert (prompt.path, prompt.stream, prompt.cache_salt) == (MESSAGES_PATH, True, "s")
    assert not prompt.add_special_tokens


def test_the_billing_line_is_dropped() -> None:
    header = {"type": "text", "text": "x-anthropic-billing-header: cch=1"}
    blocks = [header, {"type": "text", "text": "be "}, {"type": "text", "text": "nice"}]
    assert chat_of(system=blocks).messages[0] == {"role": "system", "content": "be nice"}
    assert chat_of(system=[header]).messages == [HELLO]


def test_tool_results_come_before_the_rest_of_the_message() -> None:
    content = [
        {"type": "text", "text": "and?"},
        {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "a"}, {"type": "text"}]},
    ]
    assert chat_of({"role": "user", "content": content}).messages == [
        {"role": "tool", "tool_call_id": "1", "content": "a\n"},
        {"role": "user", "content": "and?"},
    ]


def test_an_assistant_message_has_its_reasoning_and_tool_calls() -> None:
    content = [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "tool_use", "id": "1", "name": "f", "input": {"b": 1, "a": "ü"}},
    ]
    (answer,) = chat_of({"role": "assistant", "content": content}).messages
    assert answer == {
        "role": "assistant",
        "reasoning": "hm",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"b":1,"a":"ü"}'}}],
    }


def test_an_image_stays_where_it_is() -> None:
    image = {"type": "image", "source": {"type": "base64", "data": "AAAA"}}
    shown, result = {"type": "text", "text": "look"}, {"type": "tool_result", "tool_use_id": "1", "content": [image]}
    messages = chat_of({"role": "user", "content": [shown, image]}, {"role": "user", "content": [result]}).messages
    assert [part["type"] for part in messages[0]["content"]] == ["text", "image_url"]
    assert [(each["role"], each["content"]) for each in messages[1:]] == [
        ("tool", ""),
        ("user", [{"type": "image_url", "image_url": {}}]),
    ]


def test_a_tool_schema_has_the_type_object_by_default() -> None:
    (tool,) = chat_of(tools=[TOOL]).tools or []
    assert tool["function"]["parameters"] == {"properties": {}, "type": "object"}
    assert chat_of().tools is None
    assert chat_of(tools=[]).tools == []


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {}}]}]},
        {"messages": [{"role": "user", "content": []}]},
        {"thinking": {"type": "disabled"}, "chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_prompts_that_depend_on_the_engine_are_inexact(fields: dict[str, Any]) -> None:
    assert message(**fields).inexact


def test_counting_tokens_computes_nothing() -> None:
    prompt = message(path=COUNT_PATH)
    assert prompt.inexact
    assert (prompt.model, prompt.chat, prompt.prefix) == ("m", None, b"")


def test_the_prefix_is_tools_system_and_messages() -> None:
    body = b'{"model":"m","messages": [{"role":"user","content":"x"}],"system":"be","tools":[ {"name":"f"}]}'
    assert parse(MESSAGES_PATH, body).prefix == b'[ {"name":"f"}]be[{"role":"user","content":"x"}]'


@pytest.mark.parametrize(
    ("fields", "variables", "off"),
    [
        ({}, None, False),
        ({"output_config": {"effort": "high"}}, {"reasoning_effort": "high", "enable_thinking": True}, False),
        ({"thinking": {"type": "disabled"}}, {"reasoning_effort": "none", "enable_thinking": False}, True),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, None, False),
    ],
)
def test_thinking_reaches_the_template(fields: dict[str, Any], variables: dict[str, Any] | None, off: bool) -> None:
    chat = chat_of(**fields)
    assert (chat.chat_template_kwargs, chat.thinking_off) == (variables, off)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"model":"m"}', "messages"),
        (b'{"model":"m","messages":[]}', "messages"),
        (b'{"model":"m","messages":[{"role":"user"}]}', "messages[0].content"),
        (b'{"model":"m","messages":[{"role":"user","content":[{}]}]}', "messages[0].content[0].type"),
        (b'{"model":"m","messages":[{"role":"user","content":"x"}],"tools":[{}]}', "tools[0].name"),
    ],
)
def test_a_bad_request_names_the_field_at_fault(body: bytes, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(MESSAGES_PATH, body)
    assert caught.value.param == param


LOOP = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
SYSTEM_FIRST = "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "joins", "effort"),
    [
        (LOOP, False, "low"),
        (LOOP + "{% if enable_thinking is false %}<think></think>{% endif %}", False, "none"),
        (LOOP + "{{ reasoning_effort }}", False, "none"),
        (LOOP + "{% if reasoning_effort == 'none' %}{{ raise_exception('no') }}{% endif %}", False, "low"),
        (LOOP + "{{ 'low' if reasoning_effort == 'low' else 'max' }}", False, "low"),
        (SYSTEM_FIRST, True, "low"),
        (LOOP + "{{ strftime_now('%d') }}", True, "low"),
        (LOOP + "{% generation %}x{% endgeneration %}", True, "low"),
        (LOOP + "{{ 1 + 'x' }}", True, "low"),
    ],
)
def test_templates_are_probed_as_in_vllm(source: str, joins: bool, effort: str) -> None:
    template = ChatTemplate(source)

    def render(chat: Chat) -> str:
        return template.render(chat.messages, **(chat.chat_template_kwargs or {}))

    assert probe([LOOP, source], render) == TemplateTraits(
        joins_system=joins, disabled_effort="low" if effort == "low" else "none"
    )


def test_later_system_messages_are_merged_if_the_template_refuses_them() -> None:
    chat = chat_of(HELLO, {"role": "system", "content": "b"}, {"role": "system", "content": "c"}, system="a")
    assert chat.joins_system
    strict = adapt(chat, TemplateTraits(joins_system=True, disabled_effort="none"))
    assert strict.messages == [{"role": "system", "content": "abc"}, HELLO]
    assert not chat_of(HELLO, system="a").joins_system
    with pytest.raises(TokenizeError):
        ChatTemplate(SYSTEM_FIRST).render(chat.messages)
