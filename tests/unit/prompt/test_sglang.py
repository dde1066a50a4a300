from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from matrixinfer.errors import TokenizeError
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.dialect import Dialect
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.prompt.requests import parse

from .support import folder, tokenizer

SHOWN = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}{{ m | tojson }}\n{% endfor %}>"
"""Shows all that a template gets."""
SPOKEN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
PARTED = "{% for m in messages %}{% for p in m.content %}{{ p.text }}|{% endfor %}{% endfor %}"
SWITCHED = "{{ enable_thinking }} {{ thinking }} {{ reasoning_effort }} {{ given }}"
FLAT = "{% for t in tools or [] %}{{ t.name or raise_exception('no function') }}{% endfor %}"
USER = {"role": "user", "content": "go"}


def chat(*messages: dict[str, Any], path: str = "/v1/chat/completions", **fields: Any) -> Prompt:
    return parse(path, json.dumps({"model": "m", "messages": messages or [USER]} | fields).encode())


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": fields}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folder(tmp_path / "model", tokenizer(bos=True), bos_token="<s>")


def load(model: Path, template: str) -> LocalTokenizer:
    (model / "t.jinja").write_text(template)
    return LocalTokenizer.load(model, str(model / "t.jinja"))


def rendered(model: Path, template: str, prompt: Prompt, dialect: Dialect = Dialect.SGLANG) -> str:
    tokenizer = load(model, template)
    return tokenizer.decode(tokenizer.tokenize(prompt, dialect).ids).decode()


GET = function(name="get", description="d", parameters={"type": "object"})


@pytest.mark.parametrize(
    ("dialect", "tool", "expected"),
    [
        (
            Dialect.SGLANG,
            GET,
            '{"name": "get", "description": "d", "parameters": {"type": "object"}}',
        ),
        (
            Dialect.SGLANG,
            function(parameters={"type": "object"}, extra=1, strict=None, name="get"),
            '{"parameters": {"type": "object"}, "name": "get", "description": null}',
        ),
        (
            Dialect.SGLANG,
            function(strict=False, name="get", defer_loading=True),
            '{"strict": false, "name": "get", "defer_loading": true, "description": null, "parameters": null}',
        ),
        (
            Dialect.SGLANG_18,
            GET,
            '{"description": "d", "name": "get", "parameters": {"type": "object"}, "strict": false}',
        ),
        (
            Dialect.SGLANG_18,
            function(strict=True, name="get"),
            '{"description": null, "name": "get", "parameters": null, "strict": true}',
        ),
    ],
)
def test_tools_have_the_form_of_the_version(model: Path, dialect: Dialect, tool: dict[str, Any], expected: str) -> None:
    whole = f'{{"type": "function", "function": {expected}, "defer_loading": null}}\n'
    text = rendered(model, SHOWN, chat(tools=[tool]), dialect)
    assert text == whole + '{"role": "user", "content": "go"}\n>'


def test_tools_of_an_unknown_version_are_not_guessed(model: Path) -> None:
    with pytest.raises(TokenizeError, match="version is not known"):
        rendered(model, SHOWN, chat(tools=[GET]), Dialect.SGLANG_UNKNOWN)
    assert rendered(model, SPOKEN, chat(), Dialect.SGLANG_UNKNOWN) == "user: go\nassistant: "


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("auto", "getput"),
        ("required", "getput"),
        (None, "getput"),
        ("none", ""),
        ({"type": "function", "function": {"name": "put"}}, "put"),
    ],
)
def test_only_the_tools_that_may_be_chosen_are_shown(model: Path, choice: object, names: str) -> None:
    tools = [GET, function(name="put")]
    template = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    assert rendered(model, template, chat(tools=tools, tool_choice=choice)) == names


def test_a_template_that_fails_gets_bare_functions(model: Path) -> None:
    assert rendered(model, FLAT, chat(tools=[GET])) == "get"
    with pytest.raises(TokenizeError, match="no function"):
        rendered(model, FLAT.replace("t.name", "t.nothing"), chat(tools=[GET]))


@pytest.mark.parametrize("kind", ["varchar", ["string", "int"], None])
def test_schemas_that_sglang_rewrites_are_refused(model: Path, kind: object) -> None:
    tool = function(name="get", parameters={"type": "object", "properties": {"q": {"items": [{"type": kind}]}}})
    with pytest.raises(TokenizeError, match="rewrites the types"):
        rendered(model, SHOWN, chat(tools=[tool]))


PARTS = [{"type": "text", "text": "one", "x": 1}, {"type": "text", "text": "two"}]


def test_parts_are_joined_by_blanks_or_stay_parts_without_other_keys(model: Path) -> None:
    answers = {"role": "tool", "tool_call_id": "c", "content": PARTS}
    prompt = chat({"role": "user", "content": PARTS}, answers, USER)
    assert rendered(model, SPOKEN, prompt) == "user: one two\ntool: one two\nuser: go\nassistant: "
    assert rendered(model, PARTED, chat({"role": "user", "content": PARTS})) == "one|two|"
    walks = "{% for message in messages %}{% for p in message.content %}{% endfor %}{{ message | tojson }}{% endfor %}"
    assert rendered(model, walks, prompt) == (
        '{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}'
        '{"role": "tool", "tool_call_id": "c", "content": "one two"}{"role": "user", "content": "go"}'
    )


def test_a_message_keeps_the_fields_that_sglang_knows_in_its_order(model: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"b": 1, "a": null}'}, "id": "c"}
    answer = {"tool_calls": [call], "reasoning": "no", "reasoning_content": "so", "role": "Assistant"}
    text = rendered(model, SHOWN, chat({"name": "bob", "content": "go", "role": "user"}, answer, USER))
    assert text == (
        '{"role": "user", "content": "go"}\n'
        '{"role": "assistant", "content": "", "reasoning_content": "so", "tool_calls": [{"id": "c", "index": null, '
        '"type": "function", "function": {"name": "f", "arguments": {"b": 1, "a": null}}}]}\n'
        '{"role": "user", "content": "go"}\n>'
    )


@pytest.mark.parametrize("arguments", ["", "[1]", "nonsense"])
def test_calls_that_sglang_refuses_are_refused(model: Path, arguments: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(TokenizeError, match="not a JSON object"):
        rendered(model, SPOKEN, chat({"role": "assistant", "content": "", "tool_calls": [call]}))


def test_an_answer_at_the_end_is_taken_for_the_users_or_continued_without_a_second_bos(model: Path) -> None:
    answer = {"role": "assistant", "content": "I go"}
    assert rendered(model, SPOKEN, chat(USER, answer)) == "user: go\nuser: I go\nassistant: "
    prompt = chat(USER, answer, continue_final_message=True, add_generation_prompt=False)
    assert rendered(model, SPOKEN, prompt) == "user: go\nassistant: I go"
    tokenizer = load(model, "x")
    pieces = [tokenizer.encode(text, add_special_tokens=False).tolist() for text in ("user: go\nassistant: ", "I go")]
    assert load(model, SPOKEN).tokenize(prompt, Dialect.SGLANG).ids.tolist() == [*pieces[0], *pieces[1]]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "   "),
        ({"reasoning_effort": "none"}, "False False none "),
        ({"reasoning_effort": "low"}, "True True low "),
        ({"reasoning_effort": 0.5}, "True True 0.5 "),
        ({"reasoning": {"effort": "high"}}, "True True high "),
        ({"reasoning": {"enabled": "yes"}}, "True True  "),
        ({"reasoning": {"enabled": False}}, "   "),
        (
            {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False, "given": "auto"}},
            "False True high auto",
        ),
        ({"chat_template_kwargs": {"reasoning_effort": "low", "given": None}}, "  low None"),
    ],
)
def test_switches_of_reasoning(model: Path, fields: dict[str, Any], expected: str) -> None:
    assert rendered(model, SWITCHED, chat(**fields)) == expected


def test_a_request_cannot_bring_a_template_or_set_what_the_engine_sets(model: Path) -> None:
    assert rendered(model, SPOKEN, chat(chat_template="{{ messages }}")) == "user: go\nassistant: "
    for name in ("continue_final_message", "add_generation_prompt"):
        with pytest.raises(TokenizeError, match="overrides"):
            rendered(model, SPOKEN, chat(chat_template_kwargs={name: True}))


def test_what_is_not_known_is_refused(model: Path) -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}
    for prompt, dialect in (
        (chat(image), Dialect.SGLANG),
        (chat(path="/v1/messages"), Dialect.SGLANG),
        (parse("/v1/responses", b'{"model": "m", "input": "x"}'), Dialect.SGLANG),
        (chat(), Dialect.SGLANG_OLD),
    ):
        with pytest.raises(TokenizeError):
            rendered(model, SPOKEN, prompt, dialect)


def test_a_tokenizer_with_several_templates_is_refused(tmp_path: Path) -> None:
    named = [{"name": name, "template": SPOKEN} for name in ("default", "tool_use")]
    loaded = LocalTokenizer.load(folder(tmp_path / "model", tokenizer(), chat_template=named), None)
    with pytest.raises(TokenizeError, match="several chat templates"):
        loaded.tokenize(chat(), Dialect.SGLANG)


def test_completions_always_get_special_tokens(model: Path) -> None:
    prompt = parse("/v1/completions", b'{"model": "m", "prompt": "go", "add_special_tokens": false}')
    assert rendered(model, SPOKEN, prompt) == "<s>go"
    assert rendered(model, SPOKEN, prompt, Dialect.VLLM) == "go"
