r"""Where a text can be cut so that its pieces' token ids, one after the other, are the ids of the whole.

Two kinds of places are certain:

- Before an added token. A tokenizer finds its added tokens in the text first and treats what lies between them each by
  itself, unless a token is stretched by its flags, or a rule holds for the text's beginning only.
- After a line break, before an ASCII letter, where no match of the pre-tokenizer's pattern can hold both. Normal forms
  do not compose the two either.

A tokenizer is asked what it consists of, and anything that is not known here to keep to this means: no cut. Long prompts
are mostly conversations, which begin with the same pieces every time, so that a cache of pieces tokenizes only what is
new.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_LINE = re.compile(r"\n(?=[A-Za-z])")

_MAX_TOKENS = 256
"""Added tokens that are looked for at most."""

_LOCAL_NORMALIZERS = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase"})
"""They change a text between added tokens, or on the two sides of a line's end, each by itself."""

_PIECEWISE = frozenset({"Split", "Digits", "Punctuation"})
"""Pre-tokenizers that know no beginning of the text: what they do with a piece does not depend on its place."""

_LINEWISE = frozenset(
    {
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"'(?i:[sdmt]|ll|ve|re)",
        r"\p{N}",
        r"\p{N}{1,3}",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    }
)
r"""Alternatives of the patterns in use. None matches a line break and a letter after it."""

_LINE_END = r"\s*[\r\n]+"
_BLANKS = (r"\s+(?!\S)", r"\s+")
"""They treat blanks at a text's end in their own way, so the alternative for line ends must come before them."""


class Cutter:
    """Cuts texts for one tokenizer: before the added tokens `tokens` and, where pieces get long, at `lines`.

    A piece has `shortest` characters at least, but for the last one.
    """

    def __init__(self, tokens: Sequence[str] = (), *, lines: bool = False, shortest: int = 64) -> None:
        self.tokens = tokens
        self.lines = lines
        self.shortest = shortest
        self._longest = 2 * shortest  # beyond it a line's end will do
        longest_first = sorted(tokens, key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, longest_first))) if tokens else None

    def cut(self, text: str, start: int = 0) -> list[str]:
        """The pieces of `text` from `start` on, where a piece begins; none of them is empty.

        A text that goes on after `text` has the same pieces but the last.
        """
        pieces: list[str] = []
        end = len(text)
        token = self._token(text, start + self.shortest)
        while start < end:
            stop = token
            if (
                self.lines
                and stop - start > self._longest
                and (line := _LINE.search(text, start + self._longest, stop))
            ):
                stop = line.end()
            pieces.append(text[start:stop])
            start = stop
            if token < start + self.shortest:
                token = self._token(text, start + self.shortest)
        return pieces

    def cuts(self, text: str, at: int) -> bool:
        """Whether `text` may be cut at `at`, or ends there."""
        if at == len(text) or (self._tokens is not None and self._tokens.match(text, at)):
            return True
        return self.lines and at > 0 and _LINE.match(text, at - 1) is not None

    def settled(self, text: str) -> str:
        """The beginning of `text` whose ids do not depend on what follows `text`."""
        return text[: max((0, *(text.rfind(token) for token in self.tokens)))]

    def _token(self, text: str, start: int) -> int:
        """Where the first token from `start` on begins; the text's end if there is none."""
        found = None if self._tokens is None else self._tokens.search(text, start)
        return len(text) if found is None else found.start()


def cutter_of(tokenizer: Mapping[str, Any], templates: Iterable[str], *, shortest: int = 64) -> Cutter:
    """The cutter for a tokenizer, given as the JSON of its `tokenizer.json`.

    Of its added tokens those are looked for that the chat templates write. Where they write none of them, all that
    qualify are, but for numbered ones, which are places held for later use.
    """
    normalizers = _parts(tokenizer.get("normalizer"), "normalizers")
    pre_tokenizers = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if not (all(map(_is_local, normalizers)) and all(map(_is_piecewise, pre_tokenizers))):
        return Cutter()
    added = [token for token in tokenizer.get("added_tokens") or () if isinstance(token, dict)]
    tokens = _certain([token for token in added if not (normalizers and token["normalized"])], added)
    sources = "".join(templates)
    written = [token for token in tokens if token in sources]
    in_use = [token for token in tokens if not any(map(str.isdigit, token))]
    lines = _is_linewise(normalizers, pre_tokenizers) and not any(map(_takes_line_breaks, added))
    return Cutter((written or in_use)[:_MAX_TOKENS], lines=lines, shortest=shortest)


def _parts(node: object, key: str) -> list[Mapping[str, Any]]:
    """A part of a tokenizer as a flat list: a sequence holds others."""
    if not isinstance(node, dict):
        return []
    if node.get("type") != "Sequence":
        return [node]
    return [part for inner in node.get(key) or () for part in _parts(inner, key)]


def _is_local(normalizer: Mapping[str, Any]) -> bool:
    if normalizer.get("type") == "Replace":
        # A single character can be split by no cut.
        pattern = normalizer.get("pattern")
        return isinstance(pattern, dict) and len(pattern.get("String", "")) == 1
    return normalizer.get("type") in _LOCAL_NORMALIZERS


def _is_piecewise(pre_tokenizer: Mapping[str, Any]) -> bool:
    if pre_tokenizer.get("type") == "ByteLevel":
        return pre_tokenizer.get("add_prefix_space") is False
    if pre_tokenizer.get("type") == "Metaspace":
        return pre_tokenizer.get("prepend_scheme") == "never"
    return pre_tokenizer.get("type") in _PIECEWISE


def _certain(candidates: Sequence[Mapping[str, Any]], added: Sequence[Mapping[str, Any]]) -> list[str]:
    """The tokens that are found wherever they stand: nothing stretches them, and no other token can run into them."""
    contents = [token["content"] for token in added]
    ends = {content[i:] for content in contents for i in range(1, len(content))}
    inner = "\0".join(content[1:] for content in contents)
    return [
        text
        for token in candidates
        if not (token["lstrip"] or token["rstrip"] or token["single_word"])
        and (text := token["content"])
        and not (text[0].isalnum() or text[0] == "_" or text[0].isspace())
        and text not in inner
        and not any(text[:i] in ends for i in range(1, len(text)))
    ]


def _is_linewise(normalizers: Sequence[Mapping[str, Any]], pre_tokenizers: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a line's end and a letter after it are always kept apart, and each is treated as if it stood alone."""
    splits = [_alternatives(each) for each in pre_tokenizers if each.get("type") == "Split"]
    others = [each for each in pre_tokenizers if each.get("type") != "Split"]
    return (
        all(each.get("type") in _LOCAL_NORMALIZERS for each in normalizers)
        and all(each.get("type") == "ByteLevel" and each.get("use_regex") is False for each in others)
        and all(_LINEWISE.issuperset(each) and _ends_lines_first(each) for each in splits)
        and any(_LINE_END in each for each in splits)
    )


def _ends_lines_first(alternatives: Sequence[str]) -> bool:
    return all(_LINE_END in alternatives[: alternatives.index(each)] for each in _BLANKS if each in alternatives)


def _takes_line_breaks(token: Mapping[str, Any]) -> bool:
    """Whether an added token may take in a line break before a letter: one of its own, or what it strips before it."""
    return "\n" in token["content"] or (token["lstrip"] and token["content"][:1].isalpha())


def _alternatives(split: Mapping[str, Any]) -> list[str]:
    """The alternatives of a pattern, cut at the bars that no bracket encloses; the whole where it is not isolated."""
    pattern = split.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if not isinstance(regex, str) or split.get("behavior") != "Isolated" or split.get("invert"):
        return [""]
    regex = regex.replace("\r", r"\r").replace("\n", r"\n")
    found, depth, escaped, in_class = [""], 0, False, False
    for char in regex:
        if char == "|" and not (depth or escaped or in_class):
            found.append("")
            continue
        found[-1] += char
        if not escaped:
            in_class = (in_class or char == "[") and char != "]"
            depth += (char == "(") - (char == ")") if not in_class else 0
        escaped = char == "\\" and not escaped
    return found
