"""Reads the tokenizer files in a model's folder, in Hugging Face's layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from matrixinfer.errors import UNREADABLE, ConfigError

MAX_FILE_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """A vocabulary file, such as `tokenizer.json`, and the contents of the files beside it."""

    path: Path
    data: bytes
    config: Mapping[str, Any]
    """The contents of `tokenizer_config.json`."""
    special_tokens: Mapping[str, str]
    """Maps names to tokens, such as `bos_token` to `<s>`."""
    templates: Mapping[str, str]
    """Maps names to chat templates; a single template is named `default`."""


DOWNLOADS = "To download it instead, leave out the key and set `tokenization.find: download`."
"""What to do about a tokenizer that is not on this machine."""


def read(path: Path, *, where: str) -> TokenizerFiles:
    """Read a tokenizer's folder, given as the folder or as the `tokenizer.json` in it.

    Raises `ConfigError` at the key `where`.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        what = "has no tokenizer.json" if path.is_dir() else "does not exist"
        raise ConfigError(where, f"{path} {what}; expected a folder with tokenizer.json, or that file. {DOWNLOADS}")
    return read_vocabulary(file, where=where)


def read_vocabulary(file: Path, *, where: str) -> TokenizerFiles:
    """Read a vocabulary file of any kind and the files beside it. Raises `ConfigError` at the key `where`."""
    folder = file.parent
    config = read_json(folder / "tokenizer_config.json", where=where)
    template = folder / "chat_template.jinja"
    templates = _named_templates(config.get("chat_template"))
    if template.is_file():
        named = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        templates = {file.stem: read_text(file, where=where) for file in named}
        templates["default"] = read_text(template, where=where)
    return TokenizerFiles(
        path=file,
        data=_bytes(file, where),
        config=config,
        special_tokens=special_tokens(folder, where=where),
        templates=templates,
    )


def special_tokens(folder: Path, *, where: str) -> dict[str, str]:
    """The special tokens of a model's folder by name, such as `bos_token`. Raises `ConfigError` at the key `where`."""
    files = ("special_tokens_map.json", "tokenizer_config.json")
    return {
        name: token for file in files for name, token in _special_tokens(read_json(folder / file, where=where)).items()
    }


def read_text(path: Path, *, where: str) -> str:
    """Read a UTF-8 text file. Raises `ConfigError` at the key `where`."""
    try:
        return _bytes(path, where).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(where, f"{path} is not UTF-8") from error


def read_json(path: Path, *, where: str) -> dict[str, Any]:
    """Read a JSON object; empty if the file does not exist. Raises `ConfigError` at the key `where`."""
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(_bytes(path, where), type=dict[str, Any])
    except UNREADABLE as error:
        raise ConfigError(where, f"{path} is not a JSON object: {error}") from error


def code_of(config: Mapping[str, Any]) -> str | None:
    """The tokenizer class in the model's own code that `tokenizer_config.json` names, or None."""
    automatic = config.get("auto_map")
    named = automatic.get("AutoTokenizer") if isinstance(automatic, dict) else None
    return next((name for name in named if isinstance(name, str)), None) if isinstance(named, list) else None


def _bytes(path: Path, where: str) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(where, f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(where, f"cannot read {path}: {error.strerror}") from error


def _named_templates(value: object) -> dict[str, str]:
    """Templates by name, from one template or a list of `{name, template}`."""
    if isinstance(value, str):
        return {"default": value}
    named = value if isinstance(value, list) else []
    return {
        str(entry["name"]): str(entry["template"])
        for entry in named
        if isinstance(entry, dict) and "name" in entry and "template" in entry
    }


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Entries `…_token`, each a string or an object with `content`; some models put more under `extra_special_tokens`."""
    extra = config.get("extra_special_tokens")
    entries = {**(extra if isinstance(extra, dict) else {}), **config}
    tokens = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in entries.items()
        if name.endswith("_token")
    }
    return {name: token for name, token in tokens.items() if isinstance(token, str)}
