"""A rendering that continues an earlier one writes what a rendering from the beginning writes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from matrixinfer.errors import TokenizeError
from matrixinfer.prompt.base import Chat, Prompt, Rendered, SentFields
from matrixinfer.prompt.chat_template import CHATML, ChatTemplate
from matrixinfer.prompt.dialect import Dialect
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.prompt.openai import CHAT_PATH
from matrixinfer.prompt.requests import parse
from matrixinfer.prompt.resuming import Rendering

from .support import folder, tokenizer
from .template_cases import DIALECT, TOOLS
from .test_templates_against_transformers import NOW, REAL, SPECIAL

ROLES = ("system", "user", "assistant", "tool", "developer")
TEXTS = (
    "",
    " hi ",
    "Größe 🤷🏽‍♀️",
    "<think>a</think>\nb",
    "<tool_response>x</tool_response>",
    "{{ messages }}",
    "</think>",
)


def call(name: str, arguments: object) -> dict[str, Any]:
    return {"id": "call12345", "type": "function", "function": {"name": name, "arguments": arguments}}


def message(chance: random.Random, role: str) -> dict[str, Any]:
    made: dict[str, Any] = {"role": role, "content": chance.choice(TEXTS)}
    if chance.random() < 0.1:
        made["content"] = [{"type": "text", "text": chance.choice(TEXTS)} for _ in range(chance.randrange(3))]
    if role == "assistant" and chance.random() < 0.4:
        made["tool_calls"] = [call("stop", chance.choice(({}, {"a": [1, None]}, '{"b": 1}')))]
        made["content"] = chance.choice((None, "", "So:"))
    if role == "assistant" and chance.random() < 0.3:
        made["reasoning_content"] = chance.choice(("thought", ""))
    if chance.random() < 0.02:
        made["role"] = None
    return made


def conversation(seed: int) -> Iterator[dict[str, Any]]:
    """The chats of a conversation: most go on, some start again, and some change what has been said."""
    chance = random.Random(seed)
    messages: list[dict[str, Any]] = [message(chance, chance.choice(("system", "user")))]
    options: dict[str, Any] = {}
    for _ in range(chance.randrange(4, 9)):
        is_orderly = chance.random() < 0.8
        for _ in range(chance.randrange(4)):
            after = {
                "system": ("user",),
                "user": ("assistant",),
                "assistant": ("user", "tool"),
                "tool": ("assistant", "tool"),
            }
            role = chance.choice(after.get(messages[-1]["role"], ROLES) if is_orderly else ROLES)
            messages = [*messages, message(chance, role)]
        match chance.randrange(12):
            case 0:
                messages = messages[: chance.randrange(1, len(messages) + 1)]
            case 1:
                at = chance.randrange(len(messages))
                messages = [*messages[:at], message(chance, chance.choice(ROLES)), *messages[at + 1 :]]
            case 2:
                options = {**options, "tools": chance.choice((TOOLS, TOOLS[:1], None, []))}
            case 3:
                options = {**options, "add_generation_prompt": chance.random() < 0.5}
            case 4:
                variables = {"enable_thinking": chance.choice((True, False, 1, 0.0)), "content": chance.choice(TEXTS)}
                options = {**options, "chat_template_kwargs": variables}
        yield {"messages": messages, **options}


def outcome(template: ChatTemplate, chat: dict[str, Any], rendering: Rendering | None) -> str:
    arguments = {"tools": None, "documents": None, **chat, "variables": chat.get("chat_template_kwargs") or {}}
    arguments.pop("chat_template_kwargs", None)
    if rendering is None:
        arguments["messages"] = template.shaped(arguments["messages"])
    try:
        return template.render_shaped(**arguments, rendering=rendering)
    except TokenizeError as error:
        return f"error: {error}"


def steps(template: ChatTemplate, seed: int) -> int:
    """Render a conversation turn by turn, and each turn as a whole as well. Returns how often a loop continued."""
    kept: Any = {}
    continued = 0
    shaped: dict[int, dict[str, Any]] = {}
    chats = list(conversation(seed))
    for chat in chats:
        # The same messages stay the same objects, as from `Grown`.
        for each in chat["messages"]:
            shaped.setdefault(id(each), template.shaped([each])[0])
        messages = [shaped[id(each)] for each in chat["messages"]]
        rendering = Rendering(kept)
        assert outcome(template, chat | {"messages": messages}, rendering) == outcome(template, chat, None)
        continued += rendering.continued
        kept = rendering.kept or kept
    return continued


@pytest.mark.parametrize("name", [*REAL, *DIALECT, "chatml"])
def test_a_conversation_that_grows_is_rendered_as_from_the_beginning(name: str) -> None:
    source = {**REAL, **DIALECT, "chatml": CHATML}[name]
    try:
        template = ChatTemplate(source, now=lambda: NOW, aliases_reasoning=False, **SPECIAL)
    except TokenizeError:
        return  # it is meant not to compile
    for seed in range(40):
        steps(template, seed)


CONTINUED = ("chatml", "deepseekv3", "gemma3", "glm4moe", "llama3_1", "llama3_2", "phi3", "qwen2_5", "qwen3", "qwen3_6")


@pytest.mark.parametrize("name", CONTINUED)
def test_templates_of_usual_models_are_continued(name: str) -> None:
    template = ChatTemplate({**REAL, "chatml": CHATML}[name], now=lambda: NOW, aliases_reasoning=False, **SPECIAL)
    assert sum(steps(template, seed) for seed in range(40)) > 10


LOOP = "{% for m in messages %}"
FUTURE = {
    "the last message": LOOP + "{{ messages[-1].content }}|{% endfor %}",
    "a message by a computed index": LOOP + "{{ messages[loop.index0 + 2].content }}|{% endfor %}",
    "a message by an index, if there is one": LOOP + "{{ (messages[loop.index0 + 2] | default(m)).role }}|{% endfor %}",
    "the one before the first": LOOP + "{{ messages[loop.index0 - 1].content }}|{% endfor %}",
    "all of them": LOOP + "{{ messages | length }}|{% endfor %}",
    "all of them in a slice": LOOP + "{{ messages[loop.index0:] | length }}|{% endfor %}",
    "all of them in a condition": LOOP + "{% if m in messages[1:] %}a{% endif %}|{% endfor %}",
    "all of them by another name": "{% set all = messages %}" + LOOP + "{{ all | length }}|{% endfor %}",
    "all of them in a macro": "{% macro f() %}{{ messages | length }}{% endmacro %}" + LOOP + "{{ f() }}{% endfor %}",
    "their number in a variable": "{% set n = messages | length %}" + LOOP + "{{ n }}{% endfor %}",
    "their number in a namespace": "{% set s = namespace(n=messages | length) %}" + LOOP + "{{ s.n }}{% endfor %}",
    "their number from the loop": LOOP + "{{ loop.length }}{{ loop.revindex }}|{% endfor %}",
    "the loop by another name": LOOP + "{% set l = loop %}{{ l.length }}|{% endfor %}",
    "the loop by a key": LOOP + "{{ loop['length'] }}|{% endfor %}",
    "the loop within a loop": LOOP + "{% for a in [loop] %}{{ a.length }}{% endfor %}|{% endfor %}",
    "a variable that the end decides": "{% if messages[-1].role == 'user' %}{% set x = 1 %}{% endif %}" + LOOP + "{{ x }}{% endfor %}",
    "a list that holds them": "{% set x = [messages] %}" + LOOP + "{{ x[0] | length }}{% endfor %}",
    "a namespace in a namespace": "{% set a = namespace(n=0) %}{% set b = namespace(a=a) %}"
    + LOOP + "{% set a.n = a.n + 1 %}{{ b.a.n }}|{% endfor %}{{ a.n }}",
    "a namespace by two names": "{% set a = namespace(n=0) %}{% set b = a %}" + LOOP + "{% set a.n = b.n + 1 %}{{ b.n }}|{% endfor %}",
    "a namespace that may have two names": "{% set a = namespace(n=0) %}{% if messages[-1].role == 'user' %}{% set b = a %}{% else %}"
    "{% set b = namespace(n=0) %}{% endif %}" + LOOP + "{% set a.n = b.n + 1 %}{{ b.n }}|{% endfor %}",
    "a namespace that a step makes": "{% set s = namespace(a=none) %}"
    + LOOP
    + "{% if loop.first %}{% set s.a = namespace(n=0) %}{% endif %}{% set t = s.a %}{% set t.n = t.n + 1 %}{{ t.n }}|{% endfor %}",
    "a namespace in a list": "{% set a = namespace(n=0) %}{% set b = [a] %}" + LOOP + "{% set a.n = a.n + 1 %}{{ b[0].n }}{% endfor %}",
    "a cycler": "{% set c = cycler('a', 'b') %}" + LOOP + "{{ c.next() }}{% endfor %}",
    "a joiner": "{% set c = joiner() %}" + LOOP + "{{ c() }}{{ m.role }}{% endfor %}",
    "what has changed": LOOP + "{% if loop.changed(m.role) %}!{% endif %}{{ m.role }}{% endfor %}",
    "a filter of the loop": "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m.content }}{% endfor %}",
    "a loop that recurs": "{% for m in messages recursive %}{{ m.role }}{% endfor %}",
    "a loop that is left": LOOP + "{% if m.role == 'tool' %}{% break %}{% endif %}{{ m.content }}|{% endfor %}",
    "steps that are left": LOOP + "{% if m.role == 'tool' %}{% continue %}{% endif %}{{ m.content }}|{% endfor %}",
    "messages backwards": "{% for m in messages[::-1] %}{{ m.role }}{{ loop.index }}{% endfor %}",
    "messages but the first": "{% set rest = messages[1:] %}{% for m in rest %}{{ m.role }}{{ rest[loop.index0].content }}{% endfor %}",
    "messages by another name": "{% set messages = messages[1:] %}" + LOOP + "{{ m.role }}{{ messages[loop.index0].content }}{% endfor %}",
    "messages by another name in the loop": LOOP + "{% set messages = [1] %}{{ messages[0] }}{{ m.role }}{% endfor %}",
    "the next one": LOOP + "{{ m.role }}{{ loop.nextitem.role }}{{ loop.previtem.role }}{{ loop.last }}|{% endfor %}",
    "a variable that is set later": LOOP + "{{ content }}{{ m.role }}{% endfor %}{% set content = 'x' %}{{ content }}",
    "a variable that a request sets": LOOP + "{{ enable_thinking }}{{ content }}{{ m.role }}{% endfor %}",
    "a function that a request replaces": LOOP + "{{ range }}{{ m.role }}{% endfor %}",
    "texts in front": "{{ messages | length }}{{ messages[-1].content }}" + LOOP + "{{ m.role }}{% endfor %}",
    "two loops": LOOP + "{{ m.role }}{% endfor %}{{ messages | length }}" + LOOP + "{{ m.content }}{% endfor %}",
    "what loops pass on": "{% set s = namespace(t='') %}" + LOOP + "{% set s.t = s.t ~ m.content %}{% endfor %}{{ s.t }}"
    + LOOP + "{{ s.t }}{% endfor %}",
    "a loop in a condition": "{% if messages | length > 2 %}" + LOOP + "{{ m.content }}|{% endfor %}{% else %}{{ messages[0].role }}{% endif %}",
    "another object": LOOP + "{% if m.content is sameas messages[0].content %}!{% endif %}{{ m.role }}{% endfor %}",
    "a template's blocks": "{% block a %}" + LOOP + "{{ m.role }}{% endfor %}{% endblock %}",
    "a macro that may not be there": "{% if messages[-1].role == 'user' %}{% macro f() %}{% endmacro %}{% endif %}"
    + LOOP
    + "{{ f is defined }}{% endfor %}",
    "a macro in a loop": LOOP + "{% macro f() %}{{ m.role }}{% endmacro %}{{ f() }}{% endfor %}",
    "a variable that has the name of a macro": "{% macro f() %}{% endmacro %}{% set f = content %}" + LOOP + "{{ f }}{{ m.role }}{% endfor %}",
    "undefined things": LOOP + "{{ m.nothing }}{{ nothing }}{{ messages[100].role is defined }}{{ m.role }}{% endfor %}",
    "an index that is none": LOOP + "{{ messages[m.content] }}{{ messages[nothing] }}{{ messages[true].role }}{% endfor %}",
    "a text that is buffered": LOOP + "{% set x %}{{ m.role }}{% endset %}{{ x }}{% filter upper %}{{ m.content }}{% endfilter %}{% endfor %}",
    "a mark for training": LOOP + "{% generation %}{{ m.content }}{{ loop.last }}{% endgeneration %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", FUTURE)
def test_nothing_of_a_longer_conversation_is_missed(name: str) -> None:
    template = ChatTemplate(FUTURE[name], now=lambda: NOW, aliases_reasoning=False, **SPECIAL)
    for seed in range(60):
        steps(template, seed)


def test_a_clock_is_read_each_time() -> None:
    moments = iter(NOW + timedelta(minutes=i) for i in range(1000))
    source = "{{ strftime_now('%M') }}" + LOOP + "{{ m.content }}{% endfor %}"
    template = ChatTemplate(source, now=lambda: next(moments), aliases_reasoning=False)
    messages = [{"role": "user", "content": str(i)} for i in range(4)]
    first = Rendering()
    assert template.render_shaped(messages[:2], None, None, variables={}, rendering=first) == "0501"
    second = Rendering(first.kept)
    assert (template.render_shaped(messages, None, None, variables={}, rendering=second), second.continued) == (
        "060123",
        1,
    )


@pytest.mark.parametrize(
    "source",
    [
        LOOP + "{{ strftime_now('%M') }}{% endfor %}",
        "{% set now = strftime_now %}" + LOOP + "{{ now('%M') }}{% endfor %}",
        "{% macro now() %}{{ strftime_now('%M') }}{% endmacro %}" + LOOP + "{{ now() }}{% endfor %}",
    ],
)
def test_a_loop_that_reads_a_clock_is_not_continued(source: str) -> None:
    moments: Iterator[datetime] = iter(NOW + timedelta(minutes=i) for i in range(1000))
    template = ChatTemplate(source, now=lambda: next(moments), aliases_reasoning=False)
    messages = [{"role": "user", "content": str(i)} for i in range(4)]
    first = Rendering()
    assert template.render_shaped(messages[:3], None, None, variables={}, rendering=first) == "050607"
    assert template.render_shaped(messages, None, None, variables={}, rendering=Rendering(first.kept)) == "08091011"


def test_chance_is_not_continued() -> None:
    template = ChatTemplate(LOOP + "{{ range(100) | random }}{% endfor %}", aliases_reasoning=False)
    first = Rendering()
    template.render_shaped([{"role": "user", "content": ""}] * 3, None, None, variables={}, rendering=first)
    assert not first.kept


@pytest.mark.parametrize("dialect", [Dialect.VLLM, Dialect.SGLANG])
@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama3_1", "deepseekv3"])
def test_chats_have_the_same_text_with_what_was_rendered_before(
    tmp_path_factory: pytest.TempPathFactory, name: str, dialect: Dialect
) -> None:
    path = tmp_path_factory.mktemp("model")
    source = path / "template.jinja"
    source.write_text({**REAL, "chatml": CHATML}[name], encoding="utf-8")
    local = LocalTokenizer.load(folder(path, tokenizer()), str(source), cache_bytes=1 << 20)

    def text(chat: Chat) -> object:
        try:
            return local.render_for_sglang(chat, dialect) if dialect.is_sglang else local.render(chat, dialect)
        except TokenizeError as error:
            return str(error)

    for seed in range(40):
        rendered: Rendered = {}
        for turn in conversation(seed):
            for options in ({}, {"add_generation_prompt": False, "continue_final_message": True}):
                fields = {**turn, **options, "sent": SentFields(template_kwargs=turn.get("chat_template_kwargs"))}
                assert text(Chat(**fields, rendered=rendered)) == text(Chat(**fields)), json.dumps(turn)


PARTS: tuple[Any, ...] = (
    {"type": "text", "text": "only SGLang takes this for text", "uuid": "1"},
    {"type": "refusal", "refusal": "only vLLM takes this for text"},
    {"type": "image_url", "image_url": {"url": "http://x"}},
)


@pytest.mark.parametrize("part", PARTS)
def test_what_one_engine_takes_for_text_another_may_not(tmp_path: Path, part: dict[str, Any]) -> None:
    local = LocalTokenizer.load(folder(tmp_path, tokenizer()), "chatml", cache_bytes=1 << 20)
    messages = [{"role": "user", "content": [{"type": "text", "text": "Look: "}, part]}]
    prompt = parse(CHAT_PATH, json.dumps({"model": "m", "messages": messages}).encode())
    assert prompt.chat is not None
    again = replace(prompt, chat=replace(prompt.chat, rendered={}))

    def tokens(prompt: Prompt, dialect: Dialect) -> object:
        try:
            tokens = local.tokenize(prompt, dialect)
        except TokenizeError as error:
            return str(error)
        return tokens.complete, tokens.ids.tolist()

    for dialect in (Dialect.VLLM, Dialect.SGLANG) * 3:
        assert tokens(again, dialect) == tokens(prompt, dialect)
