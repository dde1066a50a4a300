"""Expected prompts were made by vLLM's own harmony functions."""

from __future__ import annotations

import base64
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import openai_harmony
import pytest

from matrixinfer.config import ModelConfig
from matrixinfer.errors import TokenizeError
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.dialect import Dialect
from matrixinfer.prompt.harmony import HarmonyTokenizer
from matrixinfer.prompt.loader import HarmonyTextTokenizer, load
from matrixinfer.prompt.requests import parse

from .support import folder, tokenizer

USER = {"role": "user", "content": "hi"}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
SYSTEM = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: 2026-01-02\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, final. "
    "Channel must be included for every message.<|end|>"
)
END = "<|start|>assistant"


@pytest.fixture(scope="module")
def encoding() -> openai_harmony.HarmonyEncoding:
    return openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


@pytest.fixture(scope="module")
def vocabulary(encoding: openai_harmony.HarmonyEncoding, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library's vocabulary as a file of ranks: the text tokenizer of a model's folder."""
    path = tmp_path_factory.mktemp("gpt-oss")
    # The library's Python API has no bytes of single tokens.
    single = encoding._inner.decode_bytes  # noqa: SLF001
    ranks = b"".join(base64.b64encode(single([i])) + b" %d\n" % i for i in range(199_998))
    (path / "o200k.tiktoken").write_bytes(ranks)
    special = {"199999": {"content": "<|endoftext|>"}, "200006": {"content": "<|start|>"}}
    (path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": special, "chat_template": TEMPLATE})
    )
    (path / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    return path


def loaded(path: Path, **settings: Any) -> Any:
    return load(ModelConfig(name="m", tokenizer=str(path), **settings), where="$.models[0]")


@pytest.fixture
def harmony(encoding: openai_harmony.HarmonyEncoding) -> HarmonyTokenizer:
    return HarmonyTokenizer(NotImplemented, encoding, now=lambda: datetime(2026, 1, 2))


def chat(*messages: dict[str, Any], path: str = "/v1/chat/completions", **fields: Any) -> Prompt:
    return parse(path, json.dumps({"model": "m", "messages": messages or [USER]} | fields).encode())


@pytest.fixture
def rendered(harmony: HarmonyTokenizer, encoding: openai_harmony.HarmonyEncoding) -> Any:
    return lambda *messages, **fields: encoding.decode(harmony.tokenize(chat(*messages, **fields)).ids.tolist())


def test_a_chat(rendered: Any) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert rendered(parts) == f"{SYSTEM}<|start|>user<|message|>ab<|end|>{END}"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_instructions_and_tools_are_the_developers(rendered: Any, role: str) -> None:
    tool = {
        "name": "get",
        "description": None,
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
    }
    later = {"role": role, "content": "Be long."}
    text = rendered({"role": role, "content": "Be brief."}, USER, later, tools=[{"type": "function", "function": tool}])
    assert text == (
        SYSTEM.replace(
            "every message.", "every message.\nCalls to these tools must go to the commentary channel: 'functions'."
        )
        + "<|start|>developer<|message|># Instructions\n\nBe brief.\n\n# Tools\n\n## functions\n\nnamespace functions {\n\n"
        "type get = (_: {\nq?: string,\n}) => any;\n\n} // namespace functions<|end|>"
        "<|start|>user<|message|>hi<|end|><|start|>developer<|message|># Instructions\n\nBe long.<|end|>" + END
    )


def test_calls_have_the_headers_that_the_models_know(rendered: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get", "arguments": '{"q": 1}'}}
    said = {"role": "assistant", "content": "well", "reasoning_content": "hm", "tool_calls": [call]}
    text = rendered(USER, said, {"role": "tool", "tool_call_id": "1", "content": "42"})
    assert text == (
        f"{SYSTEM}<|start|>user<|message|>hi<|end|><|start|>assistant<|channel|>commentary<|message|>well<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>hm<|end|>"
        '<|start|>assistant to=functions.get<|channel|>commentary json<|message|>{"q": 1}<|call|>'
        f"<|start|>functions.get<|channel|>commentary to=assistant<|message|>42<|end|>{END}"
    )


def test_reasoning_before_the_last_answer_is_dropped(rendered: Any) -> None:
    def answer(text: str) -> dict[str, Any]:
        return {"role": "assistant", "content": f"said {text}", "reasoning": f"thought {text}"}

    text = rendered(USER, answer("one"), USER, {"role": "assistant", "content": "", "reasoning": "thought last"})
    assert ("said one" in text, "thought one" in text, "thought last" in text) == (True, False, True)


@pytest.mark.parametrize("dialect", [Dialect.VLLM_30, Dialect.VLLM_24, Dialect.VLLM_UNKNOWN])
def test_versions_with_another_library_are_refused(harmony: HarmonyTokenizer, dialect: Dialect) -> None:
    harmony.tokenize(chat(), Dialect.VLLM_31)
    with pytest.raises(TokenizeError, match="not known here"):
        harmony.tokenize(chat(), dialect)


@pytest.mark.parametrize("effort", ["low", "high"])
def test_the_effort_is_that_of_the_field(rendered: Any, effort: str) -> None:
    assert f"Reasoning: {effort}" in rendered(USER, reasoning_effort=effort)
    assert "Reasoning: medium" in rendered(USER, chat_template_kwargs={"reasoning_effort": effort})
    assert f"Reasoning: {effort}" in rendered(USER, path="/v1/messages", output_config={"effort": effort})
    assert "Reasoning: low" in rendered(USER, path="/v1/messages", thinking={"type": "disabled"})


@pytest.mark.parametrize(
    "prompt",
    [
        chat(USER, reasoning_effort="none"),
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}),
        chat({"role": "stranger", "content": "x"}),
        chat(USER, truncate_prompt_tokens=5),
        chat(USER, {"role": "system", "content": "x"}, path="/v1/messages"),
        parse("/v1/responses", b'{"model": "m", "input": "x"}'),
    ],
)
def test_what_vllm_refuses_or_is_not_known_is_refused(harmony: HarmonyTokenizer, prompt: Prompt) -> None:
    with pytest.raises(TokenizeError) as caught:
        harmony.tokenize(prompt)
    assert caught.value.__cause__ is None


def test_a_folder_of_gpt_oss_is_rendered_here(vocabulary: Path) -> None:
    model = loaded(vocabulary, pretokenizer="o200k")
    assert isinstance(model, HarmonyTokenizer)
    text = model.tokenize(parse("/v1/completions", b'{"model": "m", "prompt": "hi"}')).ids.tolist()
    assert text == [3686]
    assert model.tokenize(chat(), Dialect.SGLANG).ids.tolist() == text  # by the model's template
    assert len(model.tokenize(chat()).ids) > 50


def test_another_vocabulary_is_not_taken_for_that_of_the_format(tmp_path: Path) -> None:
    path = folder(tmp_path / "model", tokenizer(), chat_template=TEMPLATE)
    (path / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    model = loaded(path)
    assert isinstance(model, HarmonyTextTokenizer)
    with pytest.raises(TokenizeError, match="not that of the format's library"):
        model.tokenize(chat())
    assert model.tokenize(chat(), Dialect.SGLANG).ids.tolist() == tokenizer().encode("hi", add_special_tokens=False).ids


def test_without_the_library_only_a_vllm_that_renders_harmony_is_asked(
    vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai_harmony", None)
    monkeypatch.delitem(sys.modules, "matrixinfer.prompt.harmony", raising=False)
    monkeypatch.delattr("matrixinfer.prompt.harmony", raising=False)
    model = loaded(vocabulary, pretokenizer="o200k")
    with pytest.raises(TokenizeError, match=r"matrixinfer-gateway\[harmony\]"):
        model.tokenize(chat())
    sent = chat().chat
    assert {each for each in Dialect if model.asks_engine(sent, each)} == {Dialect.VLLM}
    assert not model.asks_engine(chat(reasoning_effort="low").chat, Dialect.VLLM)
