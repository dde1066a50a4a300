"""Checks that templates render, and fail, exactly as in transformers."""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from matrixinfer.errors import TokenizeError
from matrixinfer.prompt.base import Chat
from matrixinfer.prompt.chat_template import CHATML, ChatTemplate
from matrixinfer.prompt.local import LocalTokenizer

from .support import folder, tokenizer
from .template_cases import CHATS, DIALECT

NOW = datetime(2031, 2, 3, 4, 5, 6)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def carried() -> dict[str, str]:
    """The templates of real models in the wheel of trl, which is not imported."""
    files = importlib.metadata.files("trl") or []
    found = {file.stem: Path(str(file.locate())) for file in files if file.name.endswith(".jinja")}
    return {name: path.read_text(encoding="utf-8") for name, path in sorted(found.items())}


REAL = carried()
TEMPLATES = {**REAL, **DIALECT, "chatml": CHATML}


class Clock(datetime):
    @classmethod
    def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
        return NOW


@pytest.fixture(scope="module")
def theirs() -> Iterator[PreTrainedTokenizerFast]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", Clock)
        make: Any = PreTrainedTokenizerFast  # its constructor is not annotated
        yield make(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL)


def expected(theirs: PreTrainedTokenizerFast, source: str | None, chat: dict[str, Any]) -> str | None:
    arguments = {"add_generation_prompt": True, **copy.deepcopy(chat)}
    try:
        text = theirs.apply_chat_template(arguments.pop("messages"), chat_template=source, tokenize=False, **arguments)
    except Exception:  # noqa: BLE001 - whatever a template raises
        return None
    assert isinstance(text, str)
    return text


def compiled(source: str) -> ChatTemplate | None:
    try:
        return ChatTemplate(source, now=lambda: NOW, aliases_reasoning=True, **SPECIAL)
    except TokenizeError:
        return None


def rendered(template: ChatTemplate | None, chat: dict[str, Any]) -> str | None:
    try:
        return None if template is None else template.render(**copy.deepcopy(chat))
    except TokenizeError:
        return None


def test_there_are_templates_of_real_models() -> None:
    assert len(REAL) >= 70
    assert len(TEMPLATES) * len(CHATS) > 4_000


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_in_transformers(theirs: PreTrainedTokenizerFast, name: str) -> None:
    source = TEMPLATES[name]
    template = compiled(source)
    differing = {
        shape: (theirs_, ours)
        for shape, chat in CHATS.items()
        if (theirs_ := expected(theirs, source, chat)) != (ours := rendered(template, chat))
    }
    assert differing == {}


def test_real_templates_render_most_shapes(theirs: PreTrainedTokenizerFast) -> None:
    """Checks that most cases render, so that the comparison is not one of failures only."""
    renderings = [expected(theirs, source, chat) for source in REAL.values() for chat in CHATS.values()]
    assert sum(each is not None for each in renderings) > 0.7 * len(renderings)


@pytest.mark.parametrize("tools", [None, [], [{"type": "function", "function": {"name": "f"}}]])
def test_the_named_template_for_tools_is_chosen_as_in_transformers(
    theirs: PreTrainedTokenizerFast, tmp_path: Path, tools: list[dict[str, Any]] | None
) -> None:
    named = {"default": "default {{ messages[0].content }}", "tool_use": "tools {{ tools | length }}"}
    path = folder(tmp_path, tokenizer(), chat_template=[{"name": n, "template": t} for n, t in named.items()])
    ours = LocalTokenizer.load(path, None).render(Chat(messages=[{"role": "user", "content": "a"}], tools=tools))
    theirs.chat_template = named
    assert ours == expected(theirs, None, {"messages": [{"role": "user", "content": "a"}], "tools": tools})


def test_the_dialect_has_no_other_extensions() -> None:
    """The names that transformers gives a template. A template that uses more would render here but fail in the engine."""
    environment = chat_template_utils._compile_jinja_template("{{ 1 }}").environment
    ours = ChatTemplate("{{ 1 }}")._template.environment
    assert isinstance(environment, jinja2.Environment)
    assert set(ours.globals) == set(environment.globals)
    assert {name for name in ours.filters if name.isidentifier()} == set(environment.filters)
    assert set(ours.tests) == set(environment.tests)
