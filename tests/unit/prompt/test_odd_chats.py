"""What clients may send in chats that are remembered: their renderings, their memory and who waits for them."""

from __future__ import annotations

import gc
import json
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from matrixinfer.config import TokenizationConfig
from matrixinfer.errors import InvalidRequest
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.bounds import LARGE_BYTES
from matrixinfer.prompt.dialect import Dialect
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.openai import CHAT_PATH
from matrixinfer.prompt.read_chats import ReadChats
from matrixinfer.prompt.requests import parse

from .support import folder, read_in_threads, tokenizer
from .test_read_chats import long_chat, said

LONG = "A long text, so that the chat is worth to be remembered. " * 600
DIALECTS = (Dialect.VLLM, Dialect.SGLANG)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> LocalTokenizer:
    return LocalTokenizer.load(folder(tmp_path_factory.mktemp("model"), tokenizer()), "chatml")


def written(tmp_path: Path, template: str) -> LocalTokenizer:
    return LocalTokenizer.load(folder(tmp_path, tokenizer(), chat_template=template), None)


def read(body: dict[str, Any], chats: ReadChats | None) -> Prompt:
    encoded = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    return parse(CHAT_PATH, encoded, chats=chats)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("content", ["hi", LONG])
def test_variables_may_have_any_name(tmp_path: Path, dialect: Dialect, content: str) -> None:
    for name in ("rendering", "is_shaped", "variables", "template", "documents", "text", "0rendering"):
        template = f"{{{{ {name} }}}}: {{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}"
        local = written(tmp_path / name, template if name[0] != "0" else "{{ messages[0].content }}")
        chat = {"messages": [{"role": "user", "content": content}], "chat_template_kwargs": {name: "given"}}
        made = local.tokenize(read(chat, ReadChats(1 << 24)), dialect)
        assert local.decode(made.ids).decode() == ("" if name[0] == "0" else "given: ") + content


@pytest.mark.parametrize("role", [{}, {"role": None}])
def test_messages_without_a_role_are_remembered_like_others(local: LocalTokenizer, role: dict[str, None]) -> None:
    chat = {"messages": [{"role": "user", "content": LONG}, {"content": "x", **role}, {"role": "developer"}]}
    expected = local.tokenize(read(chat, None)).ids.tolist()
    lately = ReadChats(1 << 24)
    assert [local.tokenize(read(chat, lately)).ids.tolist() for _ in range(2)] == [expected] * 2
    assert len(lately) == 1


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_one_engine_takes_for_text_may_be_media_for_another(local: LocalTokenizer, dialect: Dialect) -> None:
    lately = ReadChats(1 << 24)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": LONG}, {"type": "text", "text": "x", "uuid": "1"}]}
    ]
    for _ in range(3):
        expected, made = (
            LocalTokenizer.tokenize(local, read({"messages": messages}, each), Dialect.SGLANG)
            for each in (None, lately)
        )
        assert (made.complete, made.ids.tolist()) == (expected.complete, expected.ids.tolist())
        messages = [*messages, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]
    outcomes = []
    for each in (None, lately):
        try:
            outcomes.append(str(local.tokenize(read({"messages": messages}, each), dialect).ids.tolist()))
        except Exception as error:  # noqa: BLE001 - both must fail in the same way
            outcomes.append(repr(error))
    assert outcomes[0] == outcomes[1]


MESSAGES = (
    {"role": "🤷" + "x" * 200_000, "content": ""},
    {"x" * 200_000 + "🤷": "y", "content": "x"},
    {"content": "x", "y": [[]] * 60_000},
    {"content": "x", "role": [{"a": 1}] * 20_000},
    {"role": "user", "content": "🤷" + "x" * 200_000},
    {"role": "user", "content": "x" * 40_000},
)


@pytest.mark.parametrize("number", range(len(MESSAGES)))
@pytest.mark.parametrize(
    "more",
    [{}, {"documents": [{"a": [[]] * 30_000}]}, {"chat_template_kwargs": {"a": "x", "b": [{}] * 30_000}}],
    ids=["", "documents", "variables"],
)
def test_a_remembered_chat_takes_no_more_memory_than_it_counts(
    tmp_path: Path, number: int, more: dict[str, Any]
) -> None:
    local = written(
        tmp_path, "{% for m in messages %}{{ m.role }}{{ m.content }}{{ documents }}{{ a }}{{ b }}{% endfor %}"
    )
    lately = ReadChats(1 << 26)
    sent = [{"role": "user", "content": "x" * 40_000}, MESSAGES[number]]
    encoded = json.dumps({"messages": sent, **more}, ensure_ascii=False, separators=(",", ":")).encode()
    gc.collect()
    tracemalloc.start()
    try:
        chat = parse(CHAT_PATH, encoded, chats=lately).chat
        assert chat is not None
        local.render(chat)
        del chat
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(lately) == 1
    assert taken + len(encoded) <= lately.memory


async def in_threads(manager: TokenizerManager, *bodies: bytes) -> list[bytes]:
    """Read bodies. Returns those that were read in a thread."""
    with read_in_threads(manager) as used:
        for body in bodies:
            with suppress(InvalidRequest):
                await manager.read(CHAT_PATH, body)
    return used


@pytest.mark.parametrize(
    "more",
    [{"cache_salt": "b"}, {"cache_salt": 1}, {"messages": said("x")}, {"user": "x" * LARGE_BYTES}],
    ids=["other salt", "bad salt", "other messages", "long rest"],
)
async def test_a_large_chat_that_shares_no_messages_is_read_in_a_thread(more: dict[str, Any]) -> None:
    bodies = [long_chat(300), long_chat(300)[:-1] + b"," + json.dumps(more).encode()[1:]]
    async with TokenizerManager((), TokenizationConfig(), None) as manager:
        assert await in_threads(manager, *bodies) == bodies


async def test_what_precedes_the_messages_of_a_large_chat_counts() -> None:
    head = b'{"documents":[%b{}],' % (b"{}," * 100_000)
    bodies = [head + long_chat(kib)[1:] for kib in (100, 101, 102)]
    async with TokenizerManager((), TokenizationConfig(), None) as manager:
        assert await in_threads(manager, *bodies) == bodies
        assert len(manager.chats) == 2
