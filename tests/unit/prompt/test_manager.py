from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs
from tokenizers import Tokenizer

from matrixinfer.blocks import TokenIds
from matrixinfer.config import ModelConfig, TokenizationConfig
from matrixinfer.errors import ConfigError, InvalidRequest, TokenizeError
from matrixinfer.prompt import manager as prompt_manager
from matrixinfer.prompt.base import Chat, Prompt, Tokenized, Tokens
from matrixinfer.prompt.dialect import Dialect
from matrixinfer.prompt.encoders import NeedsThread, Reference
from matrixinfer.prompt.late import TokensLate
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.memory import Memory
from matrixinfer.prompt.openai import CHAT_PATH, COMPLETIONS_PATH
from matrixinfer.prompt.remote import Engine, RemoteTokenizer
from matrixinfer.prompt.requests import parse
from tests.waiting import eventually

from .support import folder, tokenizer

Answer = list[int] | TokenizeError | None


@dataclass(frozen=True)
class Pod:
    url: str = "http://a"
    engine: str | None = "vllm"
    version: str | None = "0.33.0"

    def index_name(self, _: str) -> str | None:
        return None


PODS = [Pod()]


class FakeRemote(RemoteTokenizer):
    """Gives one answer, or never answers if it is None."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[tuple[str, str]] = []
        self.costs = {}

    async def tokenize(
        self, prompt: Prompt, engines: Sequence[Engine], model: str, *, timeout_seconds: float
    ) -> TokenIds:
        self.asked.append((engines[0].url, model))
        if self.answer is None:
            await asyncio.Event().wait()
        if isinstance(self.answer, TokenizeError):
            raise self.answer
        return np.array(self.answer, dtype=np.uint32)


def text(value: Any, **fields: Any) -> Prompt:
    return parse(COMPLETIONS_PATH, json.dumps({"model": "m", "prompt": value} | fields).encode())


def chat(content: Any, **fields: Any) -> Prompt:
    return conversation([{"role": "user", "content": content}], **fields)


def conversation(messages: list[Any], **fields: Any) -> Prompt:
    return parse(CHAT_PATH, json.dumps({"model": "m", "messages": messages} | fields).encode())


def manager(
    path: Path | None = None,
    remote: RemoteTokenizer | None = None,
    memory: Memory | None = None,
    template: str = "chatml",
    **settings: Any,
) -> TokenizerManager:
    models = [ModelConfig(name="m", tokenizer=None if path is None else str(path), chat_template=template)]
    return TokenizerManager(models, TokenizationConfig(**settings), remote, memory=memory)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folder(tmp_path / "model", tokenizer(bos=True))


async def test_a_configured_model_is_tokenized_here(model: Path) -> None:
    reference = tokenizer(bos=True)
    async with manager(model) as tokenizers:
        plain = await tokenizers.tokenize(text("hello"), model="m", engines=[])
        talk = await tokenizers.tokenize(chat("hello"), model="m", engines=[])
    assert plain.tokens.ids.tolist() == reference.encode("hello").ids
    assert (plain.source, set(plain.tokens.timings_ms)) == ("local", {"tokenize"})
    rendered = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert talk.tokens.ids.tolist() == reference.encode(rendered, add_special_tokens=False).ids
    assert set(talk.tokens.timings_ms) == {"render", "tokenize"}
    assert all(each >= 0 for each in talk.tokens.timings_ms.values())


async def test_token_ids_pass_through_without_a_tokenizer() -> None:
    async with manager() as tokenizers:
        result = await tokenizers.tokenize(text([5, 6]), model="unknown", engines=[])
    assert (result.tokens.ids.tolist(), result.source) == ([5, 6], "request")


async def test_a_model_without_a_tokenizer_asks_an_engine() -> None:
    remote = FakeRemote([1, 2])
    async with manager(None, remote) as tokenizers:
        result = await tokenizers.tokenize(chat("hello"), model="index-name", engines=PODS)
    assert (result.tokens.ids.tolist(), result.source, set(result.tokens.timings_ms)) == (
        [1, 2],
        "remote",
        {"tokenize"},
    )
    assert remote.asked == [("http://a", "index-name")]


async def test_a_request_with_its_own_template_asks_an_engine(model: Path) -> None:
    remote = FakeRemote([1])
    async with manager(model, remote) as tokenizers:
        result = await tokenizers.tokenize(chat("hello", chat_template="x"), model="m", engines=PODS)
    assert result.source == "remote"


async def test_one_deadline_covers_all_engines() -> None:
    async with manager(None, FakeRemote(None), timeout_seconds=0.02) as tokenizers:
        with pytest.raises(TokenizeError, match=r"within 0\.02 s"):
            await tokenizers.tokenize(text("x"), model="m", engines=PODS)


async def test_no_engine_to_ask_is_an_error() -> None:
    for remote in (None, FakeRemote([])):
        async with manager(None, remote) as tokenizers:
            with pytest.raises(TokenizeError, match="no engine"):
                await tokenizers.tokenize(text("x"), model="m", engines=[])


async def test_a_prompt_above_the_limit_is_not_tokenized(model: Path) -> None:
    async with manager(model, max_prompt_bytes=text("x" * 100).size) as tokenizers:
        await tokenizers.tokenize(text("x" * 100), model="m", engines=[])
        await tokenizers.tokenize(text([1] * 200), model="m", engines=[])
        for larger in (text("x" * 101), chat("x", documents=[{"text": "x" * 100}])):
            with pytest.raises(TokenizeError, match="larger than"):
                await tokenizers.tokenize(larger, model="m", engines=[])


IMAGE = [{"type": "image_url", "image_url": {"url": "data:,"}}]


async def test_only_the_beginning_of_a_prompt_with_an_image_is_known(model: Path) -> None:
    messages = [{"role": "system", "content": "Look well."}, {"role": "user", "content": IMAGE}]
    async with manager(model) as tokenizers:
        tokens = (await tokenizers.tokenize(conversation(messages), model="m", engines=[])).tokens
    certain = "<|im_start|>system\nLook well.<|im_end|>\n"
    assert not tokens.complete
    assert tokens.ids.tolist() == tokenizer().encode(certain, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("architecture", "version", "asked"),
    [
        ({"architectures": ["DeepseekV32ForCausalLM"]}, "0.32.0", True),
        ({"model_type": "gpt_oss"}, "0.33.0", True),
        ({"model_type": "gpt_oss"}, "0.32.0", False),
    ],
)
async def test_a_chat_that_only_the_engine_can_render_asks_an_engine_whose_tokenize_does(
    model: Path, architecture: dict[str, Any], version: str, asked: bool
) -> None:
    (model / "config.json").write_text(json.dumps(architecture))
    remote = FakeRemote([1])
    async with TokenizerManager(
        [ModelConfig(name="m", tokenizer=str(model))], TokenizationConfig(), remote
    ) as tokenizers:
        pods = [Pod(version=version)]
        assert (await tokenizers.tokenize(text("x"), model="m", engines=pods)).source == "local"
        with nullcontext() if asked else pytest.raises(TokenizeError, match="harmony"):
            assert (await tokenizers.tokenize(chat("x"), model="m", engines=pods)).source == "remote"
    assert len(remote.asked) == asked


async def test_a_truncated_prompt_keeps_what_the_engine_keeps(model: Path) -> None:
    async with manager(model, cache_bytes=100_000) as tokenizers:
        whole = (await tokenizers.tokenize(text("one two three"), model="m", engines=[])).tokens
        for field in ("keep_last", "keep_first"):
            for count in (1, 3, len(whole.ids), 100):
                sent = text("one two three")
                prompt = replace(sent, keep_last=count) if field == "keep_last" else replace(sent, keep_first=count)
                kept = (await tokenizers.tokenize(prompt, model="m", engines=[])).tokens
                expected = whole.ids[-count:] if field == "keep_last" else whole.ids[:count]
                assert kept.ids.tolist() == expected.tolist()
                assert (kept.hashes is None) == (field == "keep_last" and count < len(whole.ids))
        with pytest.raises(TokenizeError, match="truncated"):
            await tokenizers.tokenize(replace(chat(IMAGE), keep_last=5), model="m", engines=[])
        cut = await tokenizers.tokenize(replace(text([5, 6, 7]), keep_last=2), model="m", engines=[])
    assert cut.tokens.ids.tolist() == [6, 7]


VLLM, OLD_VLLM, SGLANG = Pod(), Pod(version="0.32.0"), Pod(engine="sglang", version="0.5.23")
PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
IN_A_MACRO = """\
{%- macro text(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content %}
            {{- part.text }}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\n' ~ text(message.content) ~ '<|im_end|>\n' }}
{%- endfor %}
"""
"""SGLang does not see that content may be a list of parts here, and passes one text."""


@pytest.fixture
def in_a_macro(tmp_path: Path) -> str:
    file = tmp_path / "macro.jinja"
    file.write_text(IN_A_MACRO, encoding="utf-8")
    return str(file)


async def test_a_chat_is_rendered_as_the_engine_that_serves_the_model_does(model: Path, in_a_macro: str) -> None:
    async with manager(model, template=in_a_macro) as tokenizers:
        ids = {
            pod: (await tokenizers.tokenize(chat(PARTS), model="m", engines=[pod])).tokens.ids.tolist()
            for pod in (VLLM, OLD_VLLM, SGLANG)
        }
    words = {pod: tokenizer().decode(each, skip_special_tokens=False) for pod, each in ids.items()}
    assert words[VLLM] == words[OLD_VLLM] == words[SGLANG].replace("one two", "onetwo")
    assert ids[VLLM] != ids[SGLANG]


async def test_engines_that_render_a_chat_alike_are_tokenized_for_together_and_others_not_at_all(
    model: Path, in_a_macro: str
) -> None:
    fleet = [VLLM, SGLANG, OLD_VLLM, VLLM]
    async with manager(model, template=in_a_macro) as tokenizers:
        for prompt in (chat("hello"), text("hello"), text([1, 2])):
            assert (await tokenizers.tokenize(prompt, model="m", engines=fleet)).tokens.ids.tolist()
        with pytest.raises(TokenizeError, match=r"vLLM 0\.33 or later and SGLang 0\.5\.23 or later .* differently"):
            await tokenizers.tokenize(chat(PARTS), model="m", engines=fleet)


async def test_engines_of_each_kind_are_asked(model: Path) -> None:
    remote = FakeRemote([1])
    fleet = [Pod(), Pod("http://b", engine="sglang", version="0.5.23")]
    async with manager(None, remote) as tokenizers:
        assert (await tokenizers.tokenize(chat(PARTS), model="m", engines=fleet)).source == "remote"
        assert remote.asked == [("http://a", "m"), ("http://b", "m")]


async def test_only_sglang_takes_the_ids_that_come_with_a_chat(model: Path) -> None:
    async with manager(model) as tokenizers:
        sent = await tokenizers.tokenize(chat("hello", input_ids=[5, 6]), model="m", engines=[SGLANG])
        assert (sent.tokens.ids.tolist(), sent.source) == ([5, 6], "request")
        for ids, pod in (([5, 6], VLLM), (["no", "ids"], SGLANG)):
            ignored = await tokenizers.tokenize(chat("hello", input_ids=ids), model="m", engines=[pod])
            assert ignored.source == "local"


async def test_sglang_neither_truncates_nor_takes_templates(model: Path) -> None:
    async with manager(model) as tokenizers:
        for prompt in (chat("hello", truncate_prompt_tokens=2), chat("hello", chat_template="x")):
            whole = await tokenizers.tokenize(prompt, model="m", engines=[SGLANG])
            assert (whole.source, len(whole.tokens.ids) > 2) == ("local", True)


async def test_an_inexact_prompt_is_not_tokenized(model: Path) -> None:
    async with manager(model, FakeRemote([1])) as tokenizers:
        with pytest.raises(TokenizeError, match="the engine keeps it"):
            await tokenizers.tokenize(
                replace(text("x"), text=None, inexact="the engine keeps it"), model="m", engines=PODS
            )


async def test_prompts_are_read_while_many_are_being_tokenized(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(LocalTokenizer, "tokenize", lambda self, prompt, dialect: release.wait(30))
    monkeypatch.setattr("matrixinfer.prompt.manager._MAX_QUEUED", 3)
    long = text("word " * 50_000)
    async with manager(model, timeout_seconds=1.0) as tokenizers:
        waiting = [asyncio.create_task(tokenizers.tokenize(long, model="m", engines=[])) for _ in range(4)]
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        assert [str(error) for error in errors].count("3 prompts are already waiting to be tokenized") == 1
        assert [str(error) for error in errors].count("no token ids within 1.0 s") == 3
        body = json.dumps({"model": "m", "prompt": "word " * 100_000}).encode()
        assert (await tokenizers.read(COMPLETIONS_PATH, body)).size == len(body)
        release.set()


async def test_a_long_text_with_a_disputed_character_is_encoded_in_a_thread(
    deepseek_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = Tokenizer.from_file(str(deepseek_folder / "tokenizer.json"))
    threads: list[bool] = []
    honest = Reference.encode

    def encode(self: Reference, text: str) -> TokenIds:
        threads.append(threading.current_thread() is threading.main_thread())
        return honest(self, text)

    monkeypatch.setattr(Reference, "encode", encode)
    async with manager(deepseek_folder) as tokenizers:
        threads.clear()
        for prompt in (text("short \U0001f6d8"), text("long \U0001f6d8" * 1000)):
            tokens = (await tokenizers.tokenize(prompt, model="m", engines=[])).tokens
            assert tokens.ids.tolist() == reference.encode(prompt.text or "").ids
    assert threads == [True, False]


async def test_large_prompts_are_tokenized_in_a_thread(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[bool] = []
    honest = LocalTokenizer.render

    def render(self: LocalTokenizer, chat: Chat, dialect: Dialect) -> str:
        threads.append(threading.current_thread() is threading.main_thread())
        return honest(self, chat, dialect)

    monkeypatch.setattr(LocalTokenizer, "render", render)
    async with manager(model) as tokenizers:
        for prompt in (
            chat("word"),
            chat("word " * 40_000),
            chat("word", documents=[{"text": "word " * 40_000}]),
            conversation([{"role": "user"}] * 300),
            conversation([{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}] * 300}]),
        ):
            await tokenizers.tokenize(prompt, model="m", engines=[])
    assert threads == [True, False, False, False, False]


async def test_a_prompt_that_needs_a_thread_is_tried_on_the_event_loop_once(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_loop: list[bool] = []
    honest = LocalTokenizer.tokenize

    def tokenize(self: LocalTokenizer, prompt: Prompt, dialect: Dialect) -> Tokens:
        on_loop.append(threading.current_thread() is threading.main_thread())
        if on_loop[-1]:
            raise NeedsThread("it is not fast")
        return honest(self, prompt, dialect)

    monkeypatch.setattr(LocalTokenizer, "tokenize", tokenize)
    async with manager(model) as tokenizers:
        await tokenizers.tokenize(text("word"), model="m", engines=[])
    assert on_loop == [True, False]


async def test_the_deadline_applies_to_a_slow_tokenizer(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def render(self: LocalTokenizer, chat: Chat, dialect: Dialect) -> str:
        release.wait(5)
        return ""

    monkeypatch.setattr(LocalTokenizer, "render", render)
    async with manager(model, timeout_seconds=0.02) as tokenizers:
        with pytest.raises(TokenizeError, match="within"):
            await tokenizers.tokenize(chat("x" * 200_000), model="m", engines=[])
        release.set()


async def test_a_template_that_fails_is_a_tokenize_error(tmp_path: Path) -> None:
    template = tmp_path / "bad.jinja"
    template.write_text("{{ raise_exception('no') }}", encoding="utf-8")
    models = [ModelConfig(name="m", tokenizer=str(folder(tmp_path / "t", tokenizer())), chat_template=str(template))]
    async with TokenizerManager(models, TokenizationConfig(), None) as tokenizers:
        with pytest.raises(TokenizeError, match="no"):
            await tokenizers.tokenize(chat("x"), model="m", engines=[])


async def test_a_bad_path_fails_the_start_and_names_the_key(tmp_path: Path) -> None:
    models = [ModelConfig(name="a"), ModelConfig(name="b", tokenizer=str(tmp_path / "nowhere"))]
    tokenizers = TokenizerManager(models, TokenizationConfig(), None)
    with pytest.raises(ConfigError) as caught:
        await tokenizers.__aenter__()
    assert caught.value.path == "$.models[1].tokenizer"


async def test_threads_end_with_the_manager(model: Path) -> None:
    async with manager(model) as tokenizers:
        await tokenizers.tokenize(text("x" * 200_000), model="m", engines=[])
        assert any(thread.name.startswith("tokenize") for thread in threading.enumerate())
    await eventually(lambda: not any(thread.name.startswith(("tokenize", "read")) for thread in threading.enumerate()))


@pytest.mark.parametrize("size", [10, 300_000])
async def test_a_large_body_is_read_in_a_thread(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    threads: list[str] = []

    def noting(path: str, body: bytes, *bounds: Any, **chats: Any) -> Prompt:
        threads.append(threading.current_thread().name)
        return parse(path, body, *bounds, **chats)

    monkeypatch.setattr(prompt_manager, "parse", noting)
    body = json.dumps({"model": "m", "prompt": "x" * size}).encode()
    async with manager() as tokenizers:
        assert (await tokenizers.read(COMPLETIONS_PATH, body)).text == "x" * size
        with pytest.raises(InvalidRequest):
            await tokenizers.read(COMPLETIONS_PATH, body[:-1])
    assert [name.startswith("read") for name in threads] == [size > 1000] * 2


async def test_a_tokenizer_that_was_found_is_used_until_it_is_withdrawn(model: Path) -> None:
    remote = FakeRemote([1])
    async with manager(None, remote) as tokenizers:
        tokenizers.use("m", LocalTokenizer.load(model, None))
        assert (await tokenizers.tokenize(text("hello"), model="m", engines=PODS, may_be_late=True)).source == "local"
        tokenizers.use("m", None)
        assert (await tokenizers.tokenize(text("hello"), model="m", engines=PODS, may_be_late=True)).source == "remote"


async def test_late_token_ids_are_passed_on_when_they_come() -> None:
    remote = FakeRemote(None)
    seen: list[list[int]] = []

    async def use(tokenized: Tokenized) -> None:
        seen.append(tokenized.tokens.ids.tolist())

    async def answer(*_: Any, **__: Any) -> TokenIds:
        await release.wait()
        return np.array([7], dtype=np.uint32)

    release = asyncio.Event()
    remote.tokenize = answer  # type: ignore[method-assign]
    async with manager(None, remote, wait_milliseconds=1.0) as tokenizers:
        with pytest.raises(TokensLate, match="within 1 ms") as late:
            await tokenizers.tokenize(text("hello"), model="m", engines=PODS, may_be_late=True)
        late.value.then(use)
        assert (tokenizers.late, seen) == (1, [])
        release.set()
        await eventually(lambda: seen == [[7]])
        assert tokenizers.late == 0


@pytest.mark.parametrize("size", [10, 100_000, 1_000_000])
async def test_a_prompt_whose_token_ids_are_late_is_counted_until_they_come(size: int) -> None:
    release, memory = asyncio.Event(), Memory(100_000_000)

    async def answer(*_: Any, **__: Any) -> TokenIds:
        await release.wait()
        return np.array([7], dtype=np.uint32)

    remote = FakeRemote(None)
    remote.tokenize = answer  # type: ignore[method-assign]
    async with manager(None, remote, memory, wait_milliseconds=0.0) as tokenizers:
        body = json.dumps({"model": "m", "prompt": "x" * size}).encode()
        prompt = await tokenizers.read(COMPLETIONS_PATH, body)
        with pytest.raises(TokensLate):
            await tokenizers.tokenize(prompt, model="m", engines=PODS, may_be_late=True)
        del prompt
        assert memory.used >= 8 * size
        release.set()
        await eventually(lambda: memory.used == 0)


async def test_without_memory_no_token_ids_come_late() -> None:
    memory = Memory(100_000)
    async with manager(None, FakeRemote(None), memory, wait_milliseconds=0.0) as tokenizers:
        with pytest.raises(TokenizeError, match="take the memory"):
            await tokenizers.tokenize(text("x" * 20_000), model="m", engines=PODS, may_be_late=True)
        assert (tokenizers.late, memory.used) == (0, 0)


async def test_long_token_ids_are_counted_until_the_answer_ends() -> None:
    memory = Memory(100_000_000)
    async with manager(None, FakeRemote(None), memory) as tokenizers:
        body = json.dumps({"model": "m", "prompt": [1] * 200_000}).encode()
        kept = (await tokenizers.read(COMPLETIONS_PATH, body)).without_content()
        assert memory.used >= 800_000
        del kept
        await eventually(lambda: memory.used == 0)


async def test_who_uses_late_token_ids_may_fail(model: Path) -> None:
    async def use(_: Tokenized) -> None:
        raise RuntimeError

    async def answer(*_: Any, **__: Any) -> TokenIds:
        await asyncio.sleep(0.02)
        return np.array([7], dtype=np.uint32)

    remote = FakeRemote(None)
    remote.tokenize = answer  # type: ignore[method-assign]
    async with manager(None, remote, wait_milliseconds=0.0) as tokenizers:
        with pytest.raises(TokensLate) as late:
            await tokenizers.tokenize(text("hello"), model="m", engines=PODS, may_be_late=True)
        with capture_logs() as logs:
            late.value.then(use)
            await eventually(lambda: bool(logs))
        assert logs[0]["event"] == "late_tokens_failed"


async def test_nothing_is_asked_for_any_more_after_the_end() -> None:
    remote = FakeRemote(None)
    async with manager(None, remote, wait_milliseconds=1.0) as tokenizers:
        with pytest.raises(TokensLate):
            await tokenizers.tokenize(text("hello"), model="m", engines=PODS, may_be_late=True)
        impatient = asyncio.create_task(tokenizers.tokenize(text("other"), model="m", engines=PODS, may_be_late=True))
        await asyncio.sleep(0)
        impatient.cancel()
        await asyncio.wait([impatient])
        assert (impatient.cancelled(), tokenizers.late) == (True, 1)
    await asyncio.sleep(0)
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


async def test_a_failure_that_comes_late_is_nobodys() -> None:
    remote = FakeRemote(TokenizeError("refused"))
    async with manager(None, remote) as tokenizers:
        with pytest.raises(TokenizeError, match="refused") as error:
            await tokenizers.tokenize(text("hello"), model="m", engines=PODS, may_be_late=True)
        assert not isinstance(error.value, TokensLate)


USER = {"role": "user", "content": "x"}
SLOW = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"


async def test_a_template_that_does_not_end_costs_no_more_than_its_time(tmp_path: Path) -> None:
    template = tmp_path / "slow.jinja"
    template.write_text(SLOW, encoding="utf-8")
    models = [ModelConfig(name="m", tokenizer=str(folder(tmp_path / "t", tokenizer())), chat_template=str(template))]
    async with TokenizerManager(models, TokenizationConfig(timeout_seconds=0.2), None) as tokenizers:
        for _ in range(3):  # at first on the event loop, then in a thread
            with pytest.raises(TokenizeError, match=r"within 0\.2 s|longer than 0\.2 s"):
                await tokenizers.tokenize(chat("x"), model="m", engines=[])
        await eventually(lambda: tokenizers.working == 0)
        assert len((await tokenizers.tokenize(text("hello"), model="m", engines=[])).tokens.ids)


async def test_chats_with_too_many_items_are_not_rendered(model: Path) -> None:
    async with manager(model, max_prompt_items=10) as tokenizers:
        for many in ([USER] * 11, [{**USER, "content": [{"type": "text", "text": "x"}] * 10}]):
            with pytest.raises(TokenizeError, match="more than 10 messages, parts, tools and tool calls"):
                await tokenizers.tokenize(conversation(many), model="m", engines=[])
        assert (await tokenizers.tokenize(conversation([USER] * 10), model="m", engines=[])).source == "local"


async def test_what_is_decoded_counts_until_it_is_dropped(model: Path) -> None:
    memory = Memory(64 * 1024 * 1024)
    body = json.dumps({"model": "m", "prompt": "x" * 400_000}).encode()
    async with manager(model, memory=memory) as tokenizers:
        prompt = await tokenizers.read(COMPLETIONS_PATH, body)
        assert memory.used > len(body)
        await tokenizers.tokenize(prompt, model="m", engines=[])
        prompt = prompt.without_content()
        await eventually(lambda: memory.used == 0)  # the thread drops it a little later


async def test_a_prompt_that_waits_for_an_engine_counts_meanwhile() -> None:
    memory, remote = Memory(64 * 1024 * 1024), FakeRemote(None)
    prompt = text("x" * 200_000)
    async with manager(None, remote, memory) as tokenizers:
        asking = asyncio.create_task(tokenizers.tokenize(prompt, model="m", engines=PODS))
        await eventually(lambda: memory.used >= 8 * 200_000)
        asking.cancel()
        await asyncio.wait([asking])
        assert memory.used == 0
        full = memory.hold()
        assert full.take(memory.largest)
        with pytest.raises(TokenizeError, match="other requests take the memory"):
            await tokenizers.tokenize(prompt, model="m", engines=PODS)


async def test_what_was_decoded_of_an_invalid_body_does_not_wait_for_the_garbage_collector() -> None:
    memory = Memory(64 * 1024 * 1024)
    body = json.dumps({"model": "m", "truncate_prompt_tokens": "x", "prompt": "x" * 400_000}).encode()
    gc.disable()
    try:
        async with manager(memory=memory) as tokenizers:
            for path in (COMPLETIONS_PATH, CHAT_PATH):
                with suppress(InvalidRequest):
                    await tokenizers.read(path, body)
            await eventually(lambda: memory.used == 0)
    finally:
        gc.enable()
