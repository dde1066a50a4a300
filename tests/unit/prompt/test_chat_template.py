from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from matrixinfer.errors import TokenizeError
from matrixinfer.prompt.chat_template import CHATML, ChatTemplate
from matrixinfer.prompt.dialect import Dialect

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "once upon "}


def render(source: str, messages: list[dict[str, Any]] | None = None, **arguments: Any) -> str:
    return ChatTemplate(source).render([USER] if messages is None else messages, **arguments)


def test_chatml_writes_each_message_and_the_generation_prompt() -> None:
    messages = [{"role": "system", "content": "be brief"}, USER]
    expected = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    assert render(CHATML, messages, add_generation_prompt=False) == expected
    assert render(CHATML, messages) == expected + "<|im_start|>assistant\n"


def test_chatml_takes_parts_and_null_and_tool_calls() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": "ü"}}}]},
    ]
    assert render(CHATML, messages, add_generation_prompt=False) == (
        "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
        '\n<tool_call>\n{"name": "f", "arguments": {"x": "ü"}}\n</tool_call><|im_end|>\n'
    )


def test_chatml_lists_tools_first() -> None:
    text = render(CHATML, tools=[{"type": "function", "function": {"name": "f"}}])
    start = '<|im_start|>system\nTools:\n{"type": "function", "function": {"name": "f"}}\n<|im_end|>\n<|im_start|>user'
    assert text.startswith(start)


def test_block_tags_remove_their_whole_line() -> None:
    assert (
        render("{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}") == "hi\n"
    )


def test_break_leaves_a_loop() -> None:
    assert render("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"


def test_json_is_plain() -> None:
    value = {"b": "<ü>&", "a": [1, 2.5, None]}
    assert render("{{ v | tojson }}", v=value) == '{"b": "<ü>&", "a": [1, 2.5, null]}'
    assert render("{{ v | tojson(indent=1, sort_keys=true) }}", v={"b": 1, "a": 2}) == '{\n "a": 2,\n "b": 1\n}'
    assert render("{{ v | tojson(ensure_ascii=true, separators=(',', ':')) }}", v={"a": "ü"}) == '{"a":"\\u00fc"}'


def test_the_clock_is_injected() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2031, 2, 3))
    assert template.render([USER]) == "03 Feb 2031"


def test_special_tokens_are_variables_and_absent_ones_are_undefined() -> None:
    template = ChatTemplate(
        "{{ bos_token }}|{{ eos_token is defined }}|{{ sep_token }}", bos_token="<s>", eos_token=None
    )
    assert template.render([USER]) == "<s>|False|"


def test_variables_cannot_override_the_messages() -> None:
    assert render("{{ self is defined }}{{ x }}", self=1, x=2) == "True2"


def test_a_generation_block_renders_its_body() -> None:
    source = (
        "{% for m in messages %}{% generation %}\n[{{ m.content }}]{{ loop.index }}{% endgeneration %};{% endfor %}"
    )
    assert render(source, [USER, USER]) == "[hi]1;[hi]2;"


def test_break_cannot_leave_a_generation_block() -> None:
    with pytest.raises(TokenizeError, match="does not compile"):
        ChatTemplate("{% for m in messages %}{% generation %}{% continue %}{% endgeneration %}{% endfor %}")


PLAIN = "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}!{% endif %}"
TRIMMING = PLAIN.replace("m.content", "m.content | trim")


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        (PLAIN, "once upon ", "<hi><once upon "),
        (PLAIN, "", "<hi><"),
        (PLAIN, "hi", "<hi><hi"),
        (TRIMMING, "once upon ", "<hi><once upon"),
        (TRIMMING, " once", "<hi><once"),
    ],
)
def test_a_final_message_is_left_open(source: str, content: str, expected: str) -> None:
    messages = [USER, {"role": "assistant", "content": content}]
    text = render(source, messages, add_generation_prompt=False, continue_final_message=True)
    assert text == expected
    assert messages[-1]["content"] == content


def test_the_last_text_part_of_a_final_message_is_left_open() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, {"type": "image"}]
    text = render(
        CHATML, [{"role": "assistant", "content": parts}], add_generation_prompt=False, continue_final_message=True
    )
    assert text == "<|im_start|>assistant\nab"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}{{ m.role }}{# content #}{% endfor %}", ASSISTANT),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", ASSISTANT),
        (PLAIN, {"role": "assistant"}),
        (PLAIN, {"role": "assistant", "content": None}),
        (PLAIN, {"role": "assistant", "content": [{"type": "image"}]}),
    ],
)
def test_what_cannot_be_continued_is_an_error(source: str, message: dict[str, Any]) -> None:
    with pytest.raises(TokenizeError):
        render(source, [USER, message], add_generation_prompt=False, continue_final_message=True)


def test_a_final_message_is_not_continued_before_a_generation_prompt() -> None:
    with pytest.raises(TokenizeError, match="cannot both be set"):
        render(PLAIN, [ASSISTANT], continue_final_message=True)


@pytest.mark.parametrize("source", ["{% if %}", "{{ ", "{% generation %}", "{% nonsense %}", "{{ x | nonsense }}"])
def test_a_broken_template_is_refused_at_once(source: str) -> None:
    with pytest.raises(TokenizeError, match="compile"):
        ChatTemplate(source)


def test_a_template_may_refuse_a_chat() -> None:
    with pytest.raises(TokenizeError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content + none }}",
        "{{ messages[0].nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.encode('nonsense') }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% include 'other' %}",
    ],
)
def test_any_failure_in_a_template_is_a_tokenize_error(source: str) -> None:
    with pytest.raises(TokenizeError):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages[0].pop('role') }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    messages = [dict(USER)]
    with pytest.raises(TokenizeError):
        render(source, messages)
    assert messages == [USER]


LOOP = "{% for m in messages %}"


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("{{ messages[0].content }}", False),
        (LOOP + "{{ m.content }}{% endfor %}", False),
        (LOOP + "{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}", True),
        (LOOP + "{% for p in m['content'] | list %}{{ p.text }}{% endfor %}{% endfor %}", True),
        (LOOP + "{% for p in m.other %}{{ p.text }}{% endfor %}{% endfor %}", False),
        (
            "{% set a = messages[1:] %}{% set b = a %}{% for m in b %}{% for p in m.content %}{% endfor %}{% endfor %}",
            True,
        ),
        ("{% for m in others %}{% for p in m.content %}{% endfor %}{% endfor %}", False),
        (LOOP + "{% set c = m.content %}{% for p in c %}{% endfor %}{% endfor %}", False),
    ],
)
def test_the_template_determines_the_form_of_content(source: str, parts: bool) -> None:
    assert ChatTemplate(source).takes_parts(Dialect.VLLM) is parts


def test_an_empty_conversation_cannot_be_continued() -> None:
    with pytest.raises(TokenizeError, match="no message to continue"):
        ChatTemplate("{{ messages }}").render([], None, None, add_generation_prompt=False, continue_final_message=True)
