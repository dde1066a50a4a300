"""Tests all APIs together.

`vllm_requests.jsonl` has bodies and what vLLM 0.32 builds from them: the messages for a template that takes strings,
and the template's variables, including tools. For Anthropic messages it also has `joined`, for a template that refuses
later system messages, and `low`, the variables for a template that cannot disable thinking.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.errors import InvalidRequest
from matrixinfer.prompt.base import Chat
from matrixinfer.prompt.conversation import engine_messages, engine_tools
from matrixinfer.prompt.requests import READERS, parse
from matrixinfer.prompt.template_traits import TemplateTraits, adapt

GOLDEN = [json.loads(line) for line in Path(__file__).with_name("vllm_requests.jsonl").read_text("utf-8").splitlines()]
ANTHROPIC = [case for case in GOLDEN if "joined" in case]

BODIES: Mapping[str, Mapping[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "tools": None, "chat_template_kwargs": {}},
    "/v1/completions": {"prompt": "x", "prompt_embeds": None, "truncate_prompt_tokens": 1},
    "/v1/responses": {"input": [{"role": "user", "content": "x"}], "tools": [{}], "reasoning": {}, "instructions": "x"},
    "/v1/messages": {
        "messages": [{"role": "user", "content": [{"type": "text"}]}],
        "tools": [{"name": "f"}],
        "system": "",
    },
    "/v1/messages/count_tokens": {"messages": []},
    "/v1/embeddings": {"input": "x", "messages": None},
    "/score": {"queries": "x", "data_1": ["x"], "text_1": "x"},
    "/v1/score": {"text_1": "x"},
    "/rerank": {"query": "x"},
    "/v1/rerank": {"query": "x"},
    "/v2/rerank": {"query": "x"},
}
"""A request of each API, without `model`."""

KINDS = (
    *("text", "message", "function_call", "function_call_output", "reasoning", "custom", "namespace", "function"),
    *("tool_use", "tool_result", "tool_addition", "tool_removal", "thinking", "image", "custom_tool_call"),
)
KEYS = ("content", "text", "tool", "definition", "name", "input", "id", "tools", "arguments", "status", "summary")

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=3)
    | st.sampled_from(KINDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=2), inner),
    max_leaves=12,
)
ITEMS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(KINDS),
            "role": st.sampled_from(["user", "assistant", "system"]),
            **dict.fromkeys(KEYS, JSON),
        },
    ),
    min_size=1,
    max_size=4,
)
"""Values that resemble messages, items, blocks and tools."""


def variables(chat: Chat) -> dict[str, Any]:
    """The arguments of the template besides messages."""
    given: dict[str, Any] = (chat.chat_template_kwargs or {}) | {
        "add_generation_prompt": chat.add_generation_prompt,
        "continue_final_message": chat.continue_final_message,
    }
    optional = {"tools": engine_tools(chat.tools), "documents": chat.documents}
    return given | {key: value for key, value in optional.items() if value is not None}


@pytest.mark.parametrize("case", GOLDEN, ids=map(str, range(len(GOLDEN))))
def test_a_request_becomes_the_chat_that_vllm_builds(case: dict[str, Any]) -> None:
    prompt = parse(case["path"], json.dumps(case["body"]).encode())
    chat = prompt.chat
    assert chat is not None
    shaped = engine_messages(chat.messages, parts=False, in_schema_order=chat.in_schema_order)
    assert json.dumps(shaped) == json.dumps(case["messages"])
    assert variables(chat) == case["variables"]
    assert json.dumps(engine_tools(chat.tools)) == json.dumps(case["variables"].get("tools"))


@pytest.mark.parametrize("case", ANTHROPIC, ids=map(str, range(len(ANTHROPIC))))
def test_an_anthropic_chat_is_adapted_to_the_template_as_in_vllm(case: dict[str, Any]) -> None:
    chat = parse(case["path"], json.dumps(case["body"]).encode()).chat
    assert chat is not None
    low = adapt(chat, TemplateTraits(joins_system=True, disabled_effort="low"))
    assert json.dumps(engine_messages(low.messages, parts=False)) == json.dumps(case["joined"])
    assert variables(low) == case["low"] | {key: case["variables"][key] for key in ("tools",) if low.tools is not None}
    assert adapt(chat, TemplateTraits(joins_system=False, disabled_effort="none")) is chat


def test_a_path_that_takes_no_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        parse("/v1/nothing", b"{}")


@pytest.mark.parametrize("path", READERS)
def test_every_api_is_read(path: str) -> None:
    body = json.dumps({"model": "m", "stream": True, "cache_salt": "s", **BODIES[path]}).encode()
    prompt = parse(path, body)
    assert (prompt.path, prompt.model, prompt.size) == (path, "m", len(body))
    assert (prompt.stream, prompt.cache_salt) == (True, "s")


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_apis_without_truncation_ignore_its_field(path: str) -> None:
    prompt = parse(path, json.dumps({"model": "m", "truncate_prompt_tokens": 8, **BODIES[path]}).encode())
    assert (prompt.keep_last, prompt.keep_first) == (None, None)


@pytest.mark.parametrize("path", READERS)
def test_a_model_may_be_left_out(path: str) -> None:
    assert parse(path, json.dumps({"model": "m", **BODIES[path]}).encode()).names_model
    assert not parse(path, json.dumps(BODIES[path]).encode()).names_model


@given(path=st.sampled_from(list(READERS)), junk=st.binary(max_size=60), data=st.data())
def test_every_body_is_read_or_raises_invalid_request(path: str, junk: bytes, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(BODIES[path])))
    others = json.dumps({"model": "m", **{key: value for key, value in BODIES[path].items() if key != name}}).encode()
    blocks = ITEMS.map(lambda items: [{"role": "user", "content": items}])
    value = json.dumps(data.draw(JSON | ITEMS | blocks)).encode()
    for body in (junk, *(b'{"%s":%s,%s' % (name.encode(), each, others[1:]) for each in (junk, value))):
        try:
            prompt = parse(path, body)
        except InvalidRequest as error:
            assert error.message  # noqa: PT017 - that no other error comes is the point
        else:
            given = (prompt.chat, prompt.text, prompt.token_ids, prompt.inexact)
            assert sum(each is not None for each in given) == 1
