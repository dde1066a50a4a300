"""Tests the certain beginning of chats with media, with templates of real vision models and with tricky ones."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.errors import TokenizeError
from matrixinfer.prompt.base import Chat
from matrixinfer.prompt.chat_template import ChatTemplate
from matrixinfer.prompt.conversation import engine_messages
from matrixinfer.prompt.dialect import Dialect
from matrixinfer.prompt.multimodal import before_media

SYSTEM = {"role": "system", "content": "be nice"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
VIDEO = {"type": "video_url", "video_url": {"url": "data:"}}


def text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*content: object) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def before(template: ChatTemplate, *messages: dict[str, Any]) -> str:
    return before_media(Chat(messages=list(messages)), template.render, parts=template.takes_parts(Dialect.VLLM))


def real(name: str) -> ChatTemplate:
    spec = find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0], "chat_templates", f"{name}.jinja").read_text("utf-8")
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("name", "beginning"),
    [
        ("qwen2_5_vl", "<|im_start|>system\nbe nice<|im_end|>\n<|im_start|>user\nlook: "),
        ("qwen3_vl", "<|im_start|>system\nbe nice<|im_end|>\n<|im_start|>user\nlook: "),
        ("gemma3", "<s><start_of_turn>user\nbe nice\n\nlook:"),
        ("idefics3", "<|begin_of_text|>System: be nice<end_of_utterance>\nUser: look: "),
        ("smolvlm", "<|im_start|>System: be nice<end_of_utterance>\nUser: look: "),
        ("lfm2_2_5_vl", "<s><|im_start|>system\nbe nice<|im_end|>\n<|im_start|>user\nlook: "),
        # Images come before the message's text.
        ("llava_next", "<<SYS>>\nbe nice\n<</SYS>>\n\n[INST] "),
    ],
)
def test_templates_of_real_models_are_cut_before_their_placeholder(name: str, beginning: str) -> None:
    template = real(name)
    assert before(template, SYSTEM, user(text("look: "), IMAGE, text("what?"), IMAGE)) == beginning


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "lfm2_2_5_vl"])
def test_an_image_that_a_tool_returns_is_found(name: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer = {"role": "assistant", "content": "sure", "tool_calls": [call]}
    beginning = before(real(name), user(text("hi")), answer, {"role": "tool", "content": [IMAGE]})
    assert "sure" in beginning
    assert beginning.endswith(("<tool_response>\n", "tool\n"))


PLACEHOLDER = "<|image_pad|>"
TURNS = st.lists(st.sampled_from(["hi", "", " look\n", "<|vision_start|>", "a<|im_end|>"]), max_size=3)


@given(
    name=st.sampled_from(["qwen2_5_vl", "qwen3_vl"]),
    turns=TURNS,
    texts=TURNS,
    rest=st.lists(st.just(IMAGE), max_size=2),
)
def test_the_text_equals_the_rendering_before_the_first_placeholder(
    name: str, turns: list[str], texts: list[str], rest: list[dict[str, Any]]
) -> None:
    template = real(name)
    messages = [SYSTEM, *(user(text(turn)) for turn in turns), user(*map(text, texts), IMAGE, text("?"), *rest)]
    beginning = before(template, *messages)
    shaped = engine_messages(messages[:-1], parts=True)
    whole = template.render([*shaped, {"role": "user", "content": [*map(text, texts), {"type": "image"}, text("?")]}])
    assert whole.partition(PLACEHOLDER)[0] in (beginning, beginning + "<|vision_start|>")


BY_PART = """\
{%- for m in messages %}[{{ m.role }}]{% for p in m.content %}\
{% if p.type == 'text' %}{{ p.text }}{% else %}<{{ p.type }}>{% endif %}{% endfor %}{% endfor -%}"""
IMAGES_FIRST = """\
{%- for m in messages %}[{{ m.role }}]{% for p in m.content if p.type != 'text' %}<{{ p.type }}>{% endfor %}\
{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor -%}"""
COUNTING = """\
{%- set n = namespace(i=0) %}{% for m in messages %}{% for p in m.content if p.type != 'text' %}{% set n.i = n.i + 1 %}\
{% endfor %}{% endfor %}images: {{ n.i }};{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}\
{% endfor -%}"""
LAST_ONLY = "{% for m in messages[-1:] %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
AS_STRING = "{% for m in messages %}[{{ m.role }}]{{ m['content'] | trim }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "messages", "beginning"),
    [
        (BY_PART, [SYSTEM, user(text("a"), "b", IMAGE, text("c"))], "[system]be nice[user]ab"),
        (BY_PART, [user(VIDEO, text("c")), user(IMAGE)], "[user]"),
        (BY_PART, [user({"image_url": "x", "uuid": "u"})], "[user]"),
        (IMAGES_FIRST, [user(text("a"), IMAGE)], "[user]"),
        # Text that looks like the placeholder does not prove that the medium follows.
        (IMAGES_FIRST, [user(text("<image>"), IMAGE)], "[user]"),
        (COUNTING, [SYSTEM, user(text("a"), IMAGE)], "images: "),
        (LAST_ONLY, [user(text("a"), IMAGE), user(text("b"))], ""),
        (AS_STRING, [SYSTEM, user(text("a"), IMAGE, text("c"))], "[system]be nice[user]"),
        (AS_STRING, [user(IMAGE, text("c")), user(IMAGE)], "[user]"),
    ],
)
def test_only_the_certain_text_is_used(source: str, messages: list[dict[str, Any]], beginning: str) -> None:
    assert before(ChatTemplate(source), *messages) == beginning


@pytest.mark.parametrize(
    "content", ["x", [text("x")], [{"type": "file", "file": {}}], [{"type": "prompt_embeds", "data": "x"}], [3]]
)
def test_a_chat_without_known_media_is_an_error(content: Any) -> None:
    with pytest.raises(TokenizeError):
        before(ChatTemplate(BY_PART), {"role": "user", "content": content})


def test_a_template_that_fails_is_an_error() -> None:
    with pytest.raises(TokenizeError):
        before(ChatTemplate("{{ raise_exception('no') }}{% for p in messages[0].content %}{% endfor %}"), user(IMAGE))
