"""Loads a model's tokenizer, chosen by its configuration and the files in its folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

from matrixinfer.config import ModelConfig
from matrixinfer.errors import ConfigError, TokenizeError
from matrixinfer.prompt.base import Chat, Prompt, Tokenizer, Tokens
from matrixinfer.prompt.dialect import Dialect
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.prompt.tokenizer_files import DOWNLOADS, code_of, read_json, read_text

Mode = Literal["hf", "mistral", "tiktoken"]

RENDERED_BY_ENGINE: Mapping[str, str] = MappingProxyType(
    {
        "DeepseekV32ForCausalLM": "deepseek_v32",
        "DeepseekV4ForCausalLM": "deepseek_v4",
        "DeepseekV4ForConditionalGeneration": "deepseek_v4",
        "DeepseekV41ForCausalLM": "deepseek_v41",
        "InklingForCausalLM": "inkling",
        "InklingForConditionalGeneration": "inkling",
        "KimiK3ForConditionalGeneration": "kimi_k3",
        "MoonshotKimiaForCausalLM": "kimi_audio",
    }
)
"""Architectures whose chats vLLM 0.32 renders without a chat template, and the tokenizer mode that it uses for them."""

_HARMONY_TYPE = "gpt_oss"
"""The model type whose chats vLLM renders in the harmony format in every tokenizer mode, whatever template it is given."""
_HARMONY = "vLLM renders chats of gpt-oss in the harmony format, without a template"
_HARMONY_MISSING = f"{_HARMONY}; `pip install 'matrixinfer-gateway[harmony]'` to do so here"
_HARMONY_DIFFERS = f"{_HARMONY}, but this vocabulary is not that of the format's library"

_MISTRAL_FILE = re.compile(r"tekken\.json|tokenizer\.model\.v.*")
_MISTRAL_ONLY_FILE = re.compile(r"tekken.*\.json|.*\.model\.v\d+(m\d+)?")
_RANKS = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
_ALL_KINDS = "tokenizer.json, tekken.json, tokenizer.model.v*, tiktoken.model, *.tiktoken or a tokenizer.model of ranks"


class TextTokenizer:
    """A tokenizer for a model whose chats only the engine can render: it encodes texts and refuses chats.

    `reason` goes into the `TokenizeError` for chats.
    """

    def __init__(self, tokenizer: Tokenizer, reason: str) -> None:
        self._tokenizer = tokenizer
        self.reason = reason

    @property
    def name(self) -> str:
        return self._tokenizer.name

    @property
    def inline_bytes(self) -> int:
        return self._tokenizer.inline_bytes

    def asks_engine(self, chat: Chat, dialect: Dialect) -> bool:
        """Whether the engine's `/tokenize` renders this chat as the engine does for requests."""
        return True

    def tokenize(self, prompt: Prompt, dialect: Dialect = Dialect.VLLM) -> Tokens:
        if prompt.chat is not None:
            raise TokenizeError(self.reason)
        return self._tokenizer.tokenize(prompt, dialect)


class HarmonyTextTokenizer(TextTokenizer):
    """A tokenizer for gpt-oss without the harmony library. SGLang renders these chats by the model's template."""

    def asks_engine(self, chat: Chat, dialect: Dialect) -> bool:
        """Only vLLM from 0.33 on renders harmony in `/tokenize`, where a chat's reasoning effort has no field."""
        return dialect is Dialect.VLLM and chat.sent is not None and chat.sent.reasoning_effort is None

    def tokenize(self, prompt: Prompt, dialect: Dialect = Dialect.VLLM) -> Tokens:
        return self._tokenizer.tokenize(prompt, dialect) if dialect.is_sglang else super().tokenize(prompt, dialect)


def load(model: ModelConfig, *, where: str, block_size: int = 128, cache_bytes: int = 0) -> Tokenizer:
    """Load the tokenizer of `model`, whose `tokenizer` must be set. Takes seconds for large vocabularies.

    `block_size` and `cache_bytes` are those of `LocalTokenizer.load`. Raises `ConfigError` below the key `where` of the
    model's configuration: if there is no file of the configured kind, if the files allow more than one kind, or if
    reading the file needs an extra that is not installed.
    """
    if model.tokenizer is None:
        raise ConfigError(f"{where}.tokenizer", "expected the path of the model's folder")
    path = Path(model.tokenizer)
    mode, file = _find(path, model.tokenizer_mode, where=f"{where}.tokenizer")
    tokenizer: Tokenizer
    if mode == "mistral":
        return _mistral(file, where=f"{where}.tokenizer")
    if mode == "tiktoken":
        tokenizer = _tiktoken(file, model, where=where, block_size=block_size, cache_bytes=cache_bytes)
    else:
        tokenizer = LocalTokenizer.load(
            file, model.chat_template, where=where, block_size=block_size, cache_bytes=cache_bytes
        )
    config = read_json(file.parent / "config.json", where=f"{where}.tokenizer")
    if config.get("model_type") == _HARMONY_TYPE:
        return _harmony(tokenizer)
    reason = _engine_renders(file.parent, model, config, where=f"{where}.tokenizer")
    return tokenizer if reason is None else TextTokenizer(tokenizer, reason)


def _harmony(tokenizer: Tokenizer) -> Tokenizer:
    try:
        from matrixinfer.prompt.harmony import HarmonyTokenizer  # noqa: PLC0415 - needs an extra
    except ImportError:
        return HarmonyTextTokenizer(tokenizer, _HARMONY_MISSING)
    return HarmonyTokenizer.load(tokenizer) or HarmonyTextTokenizer(tokenizer, _HARMONY_DIFFERS)


def _mistral(file: Path, *, where: str) -> Tokenizer:
    try:
        from matrixinfer.prompt.mistral import MistralTokenizer  # noqa: PLC0415 - needs an extra
    except ImportError as error:
        raise _missing("mistral", file, where=where) from error
    return MistralTokenizer.load(file, where=where)


def _tiktoken(file: Path, model: ModelConfig, *, where: str, block_size: int, cache_bytes: int) -> Tokenizer:
    try:
        from matrixinfer.prompt import tiktoken_files  # noqa: PLC0415 - needs an extra
    except ImportError as error:
        raise _missing("tiktoken", file, where=f"{where}.tokenizer") from error
    return tiktoken_files.load(
        file, model.chat_template, model.pretokenizer, where=where, block_size=block_size, cache_bytes=cache_bytes
    )


def _missing(extra: str, file: Path, *, where: str) -> ConfigError:
    return ConfigError(where, f"{file} needs an extra: pip install 'matrixinfer-gateway[{extra}]'")


def _find(path: Path, mode: str, *, where: str) -> tuple[Mode, Path]:
    """Find the vocabulary at `path`: its kind and its file."""
    if path.is_file():
        return _kind(path, mode), path
    if not path.is_dir():
        raise ConfigError(where, f"{path} does not exist. {DOWNLOADS}")
    names = {each.name: each for each in sorted(path.iterdir()) if each.is_file()}
    json = names.get("tokenizer.json")
    own = _mistral_file(names, only_named=mode == "auto")
    ranks = next((each for each in names.values() if _is_ranks(each)), None)
    if mode == "auto" and own and any(re.fullmatch(r"consolidated.*\.safetensors", name) for name in names):
        return "mistral", own  # as in vLLM: Mistral's own weights and vocabulary
    if mode == "auto" and own and json and not any(name.endswith(".safetensors") for name in names):
        raise ConfigError(
            f"{where}Mode",
            f"{path} has both {own.name} and {json.name}; set `mistral` or `hf`, whichever the engine uses",
        )
    found: dict[Mode, Path | None] = {"hf": json, "mistral": own, "tiktoken": ranks}
    for kind, file in found.items():
        if file is not None and mode in ("auto", kind):
            return kind, file
    raise ConfigError(where, f"{path} has no vocabulary for `tokenizerMode: {mode}`; looked for {_file_names(mode)}")


def _kind(file: Path, mode: str) -> Mode:
    if mode != "auto":
        return cast("Mode", mode)
    if _MISTRAL_ONLY_FILE.fullmatch(file.name):
        return "mistral"
    return "tiktoken" if _is_ranks(file) else "hf"


def _mistral_file(names: Mapping[str, Path], *, only_named: bool) -> Path | None:
    """The file that mistral-common loads: `tekken.json` if it exists, else the last match by name."""
    if "tekken.json" in names:
        return names["tekken.json"]
    pattern = _MISTRAL_FILE if only_named else re.compile(r".*\.model(\.v\d+(m\d+)?)?")
    return max((each for name, each in names.items() if pattern.fullmatch(name)), default=None)


def _is_ranks(file: Path) -> bool:
    """True if the file is named like a tiktoken vocabulary and starts with a line of base64 and a number."""
    if file.suffix not in (".model", ".tiktoken"):
        return False
    with file.open("rb") as opened:
        return _RANKS.fullmatch(opened.readline(4096)) is not None


def _file_names(mode: str) -> str:
    return {
        "hf": "tokenizer.json",
        "mistral": "tekken.json or *.model.v*",
        "tiktoken": "tiktoken.model, *.tiktoken or a tokenizer.model of ranks",
    }.get(mode, _ALL_KINDS)


def _engine_renders(folder: Path, model: ModelConfig, config: Mapping[str, Any], *, where: str) -> str | None:
    """Why only the engine can render the model's chats, or None. A configured chat template always means None."""
    if model.chat_template is not None or model.tokenizer_mode != "auto":
        return None
    named = config.get("architectures")
    for name in named if isinstance(named, list) else ():
        if name in RENDERED_BY_ENGINE:
            return f"the engine renders chats of {name} itself, without a template"
    return _code_renders(folder, where=where)


def _code_renders(folder: Path, *, where: str) -> str | None:
    """Why the model's own code, which the engine runs, may render chats differently from the template; else None."""
    config: Mapping[str, Any] = read_json(folder / "tokenizer_config.json", where=where)
    code = code_of(config)
    if code is None:
        return None
    file = folder / f"{code.rpartition('--')[2].partition('.')[0]}.py"
    if file.is_file() and "def apply_chat_template(" not in read_text(file, where=where):
        return None
    return f"the model's own code ({code}) may render chats differently from its template"
