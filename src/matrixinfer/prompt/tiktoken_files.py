"""Loads vocabularies in tiktoken's format: one line per token, with base64 and a rank.

Such a file contains neither the special tokens, which are in `tokenizer_config.json`, nor the pattern that splits a
text, which is in the model's code. Only a few patterns are in use; if the folder does not determine one, the
configuration must.
"""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gigatoken
import numpy as np
import tiktoken

from matrixinfer.blocks import TokenIds
from matrixinfer.errors import ConfigError
from matrixinfer.prompt.encoders import Encoder, choose
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.prompt.tokenizer_files import TokenizerFiles, code_of, read_vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a family of models uses its ranks."""

    pattern: str
    """A regular expression in tiktoken's dialect. Each match is encoded separately."""
    reserved: int = 0
    """Number of ids after the ranks that are special tokens, named or not."""
    slices: bool = False
    """Whether long texts are sliced first, as Kimi's own code does."""


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
)
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "cl100k": Family(pattern=rf"{_WORDS}|\p{{N}}{{1,3}}|{_MARKS}|{_BLANKS}"),
        "kimi": Family(
            # Han characters form separate words, so they are excluded from the classes of letters.
            pattern=r"[\p{Han}]+|"
            + _CASED_WORDS.replace(r"\p{M}]", r"\p{M}&&[^\p{Han}]]")
            + rf"|\p{{N}}{{1,3}}|{_MARKS}|{_BLANKS}",
            reserved=258,
            slices=True,
        ),
        "o200k": Family(pattern=rf"{_CASED_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"),
        "qwen2": Family(pattern=rf"{_WORDS}|\p{{N}}|{_MARKS}|{_BLANKS}"),
    }
)
"""The names are those that gigatoken uses."""

_SLICE_CHARS = 400_000
_RUN_CHARS = 25_000
"""Kimi's code slices the text between special tokens after every 400,000 characters, and within such a slice after every
25,000 characters of a run of blanks or of non-blanks."""

_RUNS = re.compile(r"\s+|\S+")


class Tiktoken:
    """Encodes with tiktoken, the library that defines the format."""

    name = "tiktoken"
    inline_bytes = 8 * 1024
    piece_chars = 256

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding

    def encode(self, text: str) -> TokenIds:
        ids: TokenIds = self._encoding.encode_to_numpy(text, allowed_special="all")
        return ids

    def encode_each(self, texts: Sequence[str]) -> Sequence[TokenIds]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: TokenIds) -> bytes:
        return self._encoding.decode_bytes(ids.tolist())


class Sliced:
    """Encodes long texts in Kimi's slices, after splitting them at `special_tokens`."""

    def __init__(self, encoder: Encoder, special_tokens: Mapping[str, int]) -> None:
        self.name = encoder.name
        self.inline_bytes = encoder.inline_bytes
        self.piece_chars = encoder.piece_chars
        self.decode = encoder.decode
        self._encoder = encoder
        self._special_tokens = re.compile("(" + "|".join(map(re.escape, special_tokens)) + ")")

    def encode(self, text: str) -> TokenIds:
        if len(text) <= _RUN_CHARS:
            return self._encoder.encode(text)
        return np.concatenate([self._encoder.encode(each) for each in self._slices(text)])

    def encode_each(self, texts: Sequence[str]) -> Sequence[TokenIds]:
        return [self.encode(text) for text in texts]

    def _slices(self, text: str) -> Iterator[str]:
        for part in self._special_tokens.split(text):
            for start in range(0, len(part), _SLICE_CHARS):
                yield from _by_runs(part[start : start + _SLICE_CHARS])


def _by_runs(text: str) -> Iterator[str]:
    start = 0
    for run in _RUNS.finditer(text):
        for stop in range(run.start() + _RUN_CHARS, run.end(), _RUN_CHARS):
            yield text[start:stop]
            start = stop
    yield text[start:]


def family_of(files: TokenizerFiles, pretokenizer: str | None, *, where: str) -> str:
    """The name of the vocabulary's family: the configured one, else the one that the folder indicates.

    Raises `ConfigError` below the key `where` of the model's configuration if neither determines it.
    """
    if pretokenizer is not None:
        return pretokenizer
    name = files.path.name
    code = code_of(files.config)
    if code is None and name.endswith(".model"):
        return "cl100k"  # transformers' own reader supports only this pattern
    if code is not None and code.startswith("tokenization_kimi."):
        return "kimi"
    if name in ("cl100k_base.tiktoken", "o200k_base.tiktoken"):
        return name.partition("_")[0]
    raise ConfigError(
        f"{where}.pretokenizer", f"{files.path} does not say how text is split; expected one of {', '.join(FAMILIES)}"
    )


def special_tokens_of(config: Mapping[str, Any], ranks: int, family: Family) -> dict[str, int]:
    """Special tokens and their ids: those in `added_tokens_decoder`, and placeholders for the unnamed ids.

    Raises `ValueError` for tokens that tiktoken may not find: those that also match the blanks around them, and those
    that another token starts with.
    """
    named: dict[int, str] = {}
    for key, token in (config.get("added_tokens_decoder") or {}).items():
        if any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            raise ValueError(f"the added token {key} has flags that tiktoken does not support")
        named[int(key)] = token["content"]
    if not named:
        raise ValueError("tokenizer_config.json beside it has no special tokens (`added_tokens_decoder`)")
    stop = max(max(named) + 1, ranks + family.reserved)
    tokens = {named.get(i, f"<|reserved_token_{i}|>"): i for i in (*sorted(named), *range(ranks, stop))}
    ordered = sorted(tokens)
    if any(after.startswith(before) for before, after in itertools.pairwise(ordered)):
        raise ValueError("one of its special tokens starts with another one")
    return tokens


def read_ranks(data: bytes) -> dict[bytes, int]:
    """Map each token to its rank. Raises `ValueError` if a line is not base64 and a number."""
    ranks: dict[bytes, int] = {}
    for line in data.splitlines():
        token, _, rank = line.partition(b" ")
        if token:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    return ranks


def encoder_of(file: Path, ranks: dict[bytes, int], special_tokens: dict[str, int], family: str) -> Encoder:
    """The fastest encoder whose ids equal tiktoken's on samples."""
    pattern = FAMILIES[family].pattern
    exact = Tiktoken(
        tiktoken.Encoding(file.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)
    )
    encoder = choose(
        lambda: gigatoken.Tokenizer.from_tiktoken(file, family, special_tokens),
        exact,
        list(special_tokens),
        source=str(file),
    )
    return Sliced(encoder, special_tokens) if FAMILIES[family].slices else encoder


def load(
    file: Path,
    chat_template: str | None,
    pretokenizer: str | None,
    *,
    where: str,
    now: Callable[[], datetime] = datetime.now,
    block_size: int = 128,
    cache_bytes: int = 0,
) -> LocalTokenizer:
    """Load a file of ranks. The other arguments are those of `LocalTokenizer.load`. Raises `ConfigError`."""
    files = read_vocabulary(file, where=f"{where}.tokenizer")
    name = family_of(files, pretokenizer, where=where)
    try:
        ranks = read_ranks(files.data)
        special_tokens = special_tokens_of(files.config, len(ranks), FAMILIES[name])
        before, after = (_added(files, side, special_tokens) for side in ("bos", "eos"))
        encoder = encoder_of(file, ranks, special_tokens, name)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(f"{where}.tokenizer", f"{file} is not a usable tokenizer: {error}") from error
    return LocalTokenizer.build(
        encoder,
        files,
        _description(name, special_tokens),
        chat_template,
        around=(before, after),
        where=where,
        now=now,
        block_size=block_size,
        cache_bytes=cache_bytes,
    )


def _added(files: TokenizerFiles, side: str, special_tokens: Mapping[str, int]) -> TokenIds:
    """The ids that transformers adds before (`bos`) or after (`eos`) a text; models' own code adds none."""
    wanted = files.config.get(f"add_{side}_token") is True and code_of(files.config) is None
    return np.array([special_tokens[files.special_tokens[f"{side}_token"]]] if wanted else [], dtype=np.uint32)


def _description(family: str, special_tokens: Mapping[str, int]) -> dict[str, Any]:
    """The vocabulary in the form of a `tokenizer.json`, as far as the cutter needs it."""
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": FAMILIES[family].pattern}, "behavior": "Isolated"},
        "added_tokens": [{"content": token, "special": True, **flags} for token in special_tokens],
    }
