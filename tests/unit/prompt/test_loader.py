from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from matrixinfer import config
from matrixinfer.config import ModelConfig
from matrixinfer.errors import ConfigError, TokenizeError
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.loader import RENDERED_BY_ENGINE, load
from matrixinfer.prompt.requests import parse

from .mistral_vocabularies import vocabulary
from .support import folder, tokenizer

CHAT = parse("/v1/chat/completions", b'{"model": "m", "messages": [{"role": "user", "content": "hi"}]}')
TEXT = parse("/v1/completions", b'{"model": "m", "prompt": "hi"}')
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
RANKS = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
RANKS_CONFIG = {"chat_template": TEMPLATE, "added_tokens_decoder": {"256": {"content": "<x>"}}}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "model"


def hf(path: Path, **config: object) -> None:
    folder(path, tokenizer(), **({"chat_template": TEMPLATE} | config))


def mistral(path: Path) -> None:
    vocabulary(path, "spm-v3")


def tiktoken(path: Path, name: str = "tiktoken.model", **config: object) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(RANKS)
    (path / "tokenizer_config.json").write_text(json.dumps(RANKS_CONFIG | config), encoding="utf-8")


def write(path: Path, name: str, value: object) -> None:
    (path / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def library(path: Path, **settings: Any) -> str:
    """The library that reads a small vocabulary."""
    loaded = load(ModelConfig(name="m", tokenizer=str(path), **settings), where="$.models[0]")
    return {"gigatoken": "hf"}.get(loaded.name, loaded.name)


def ids(path: Path, prompt: Prompt, **settings: Any) -> list[int]:
    loaded = load(ModelConfig(name="m", tokenizer=str(path), **settings), where="$.models[0]")
    found: list[int] = loaded.tokenize(prompt).ids.tolist()
    return found


def test_the_only_vocabulary_in_a_folder_is_used(tmp_path: Path) -> None:
    hf(tmp_path / "hf")
    mistral(tmp_path / "mistral")
    tiktoken(tmp_path / "tiktoken")
    tiktoken(tmp_path / "llama", "tokenizer.model")
    assert library(tmp_path / "hf") == "hf"
    assert library(tmp_path / "mistral") == "mistral-common"
    assert ids(tmp_path / "tiktoken", CHAT) == [*b"hi"]
    assert ids(tmp_path / "llama", CHAT) == [*b"hi"]


def test_the_name_and_the_first_line_determine_the_kind_of_a_file(tmp_path: Path) -> None:
    hf(tmp_path / "hf")
    mistral(tmp_path / "mistral")
    tiktoken(tmp_path / "tiktoken", "tokenizer.model")
    assert library(tmp_path / "hf" / "tokenizer.json") == "hf"
    assert library(tmp_path / "mistral" / "tokenizer.model.v3") == "mistral-common"
    assert ids(tmp_path / "tiktoken" / "tokenizer.model", TEXT) == [*b"hi"]


def test_mistral_vocabularies_beside_mistral_weights_come_first_as_in_vllm(model: Path) -> None:
    hf(model)
    mistral(model)
    write(model, "consolidated-00001-of-00002.safetensors", "")
    assert library(model) == "mistral-common"
    assert library(model, tokenizer_mode="hf") == "hf"


def test_mistral_vocabularies_beside_other_weights_are_ignored_as_in_vllm(model: Path) -> None:
    hf(model)
    mistral(model)
    write(model, "model-00001-of-00002.safetensors", "")
    assert library(model) == "hf"
    assert library(model, tokenizer_mode="mistral") == "mistral-common"


def test_two_vocabularies_without_weights_leave_the_choice_to_the_configuration(model: Path) -> None:
    hf(model)
    mistral(model)
    with pytest.raises(
        ConfigError, match=r"^\$\.models\[0\]\.tokenizerMode: .*tokenizer\.model\.v3 and tokenizer\.json"
    ):
        library(model)
    assert library(model, tokenizer_mode="hf") == "hf"


def test_tokenizer_json_comes_before_ranks_unless_the_configuration_says_otherwise(model: Path) -> None:
    tiktoken(model)
    hf(model, **RANKS_CONFIG)
    assert ids(model, TEXT) != [*b"hi"]
    assert ids(model, TEXT, tokenizer_mode="tiktoken") == [*b"hi"]


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [("auto", "tekken.json"), ("hf", "tokenizer.json"), ("mistral", r"\*\.model\.v\*"), ("tiktoken", r"\*\.tiktoken")],
)
def test_an_error_names_the_expected_files(model: Path, mode: str, wanted: str) -> None:
    model.mkdir()
    write(model, "tokenizer.txt", "")
    with pytest.raises(ConfigError, match=rf"^\$\.models\[0\]\.tokenizer: .*`tokenizerMode: {mode}`.*{wanted}"):
        library(model, tokenizer_mode=mode)


def test_an_error_names_a_missing_folder(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"^\$\.models\[0\]\.tokenizer: .*model does not exist.*find: download"):
        library(model)


@pytest.mark.parametrize(
    ("extra", "package", "module"),
    [("mistral", "mistral_common", "mistral"), ("tiktoken", "tiktoken", "tiktoken_files")],
)
def test_an_error_names_a_missing_extra(
    model: Path, monkeypatch: pytest.MonkeyPatch, extra: str, package: str, module: str
) -> None:
    mistral(model) if extra == "mistral" else tiktoken(model)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"matrixinfer.prompt.{module}", raising=False)
    monkeypatch.delattr(f"matrixinfer.prompt.{module}", raising=False)
    with pytest.raises(ConfigError, match=rf"^\$\.models\[0\]\.tokenizer: .*matrixinfer-gateway\[{extra}\]"):
        library(model)


@pytest.mark.parametrize("architecture", sorted(RENDERED_BY_ENGINE))
def test_chats_that_the_engine_renders_itself_are_refused(model: Path, architecture: str) -> None:
    hf(model)
    write(model, "config.json", {"architectures": [architecture]})
    with pytest.raises(TokenizeError, match=f"the engine renders chats of {architecture} itself"):
        ids(model, CHAT)
    assert ids(model, TEXT)
    assert ids(model, CHAT, tokenizer_mode="hf")
    template = model / "given.jinja"
    write(model, "given.jinja", TEMPLATE)
    assert ids(model, CHAT, chat_template=str(template))


def test_chats_of_gpt_oss_are_refused_in_every_mode(model: Path) -> None:
    hf(model)
    write(model, "config.json", {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]})
    for mode in ("auto", "hf"):
        with pytest.raises(TokenizeError, match="harmony"):
            ids(model, CHAT, tokenizer_mode=mode)
        assert ids(model, TEXT, tokenizer_mode=mode)


@pytest.mark.parametrize(
    "source", [None, "class TikTokenTokenizer:\n    def apply_chat_template(self):\n        pass\n"]
)
def test_chats_that_the_models_own_code_may_render_are_refused(model: Path, source: str | None) -> None:
    tiktoken(model, auto_map={"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]})
    if source is not None:
        write(model, "tokenization_kimi.py", source)
    with pytest.raises(TokenizeError, match=r"own code \(tokenization_kimi\.TikTokenTokenizer\)"):
        ids(model, CHAT)
    assert ids(model, TEXT) == [*b"hi"]


def test_chats_that_the_models_own_code_does_not_render_are_served(model: Path) -> None:
    tiktoken(model, auto_map={"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]})
    write(model, "tokenization_kimi.py", "class TikTokenTokenizer:\n    pass\n")
    assert ids(model, CHAT) == [*b"hi"]


def test_the_configuration_names_the_modes_of_vllm_and_ours(tmp_path: Path) -> None:
    text = "models: [{name: m, tokenizer: t, tokenizerMode: tiktoken, pretokenizer: kimi}]"
    (read,) = config.parse(text, base=tmp_path).models
    assert (read.tokenizer_mode, read.pretokenizer) == ("tiktoken", "kimi")
    with pytest.raises(ConfigError, match="tokenizerMode"):
        config.parse("models: [{name: m, tokenizerMode: slow}]", base=tmp_path)
    with pytest.raises(ConfigError, match="pretokenizer"):
        config.parse("models: [{name: m, pretokenizer: guess}]", base=tmp_path)
