r"""Finds positions where a text can be cut so that the token ids of its pieces, concatenated, equal those of the whole.

Two kinds of positions are safe:

- Before an added token. A tokenizer first finds its added tokens in the text and then encodes the text between them
  separately, unless a token's flags extend its match, or a rule applies only at the start of the text.
- After a line break and before an ASCII letter, if no match of the pre-tokenizer's pattern can contain both.
  Normalization does not compose the two either.

The tokenizer's description is inspected, and any component that is not known to be safe here disables cutting. Long
prompts are mostly conversations that begin with the same pieces every time, so a cache of pieces leaves only the new
text to be tokenized.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_LINE = re.compile(r"\n(?=[A-Za-z])")

_MAX_TOKENS = 256
"""Limit of added tokens to search for."""

_LOCAL_NORMALIZERS = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase"})
"""Normalizers that treat the texts between added tokens, and before and after a line break, independently."""

_PIECEWISE = frozenset({"Split", "Digits", "Punctuation"})
"""Pre-tokenizers whose result for a piece does not depend on its position in the text."""

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
r"""Alternatives of the patterns in use. None matches a line break followed by a letter."""

_LINE_END = r"\s*[\r\n]+"
_BLANKS = (r"\s+(?!\S)", r"\s+")
"""These treat blanks at the end of a text specially, so the alternative for line ends must come before them."""


class Cutter:
    """Cuts texts for one tokenizer: before the added tokens `tokens` and, with `lines`, at line ends in long pieces.

    Every piece but the last has at least `shortest` characters.
    """

    def __init__(self, tokens: Sequence[str] = (), *, lines: bool = False, shortest: int = 64) -> None:
        self.tokens = tokens
        self.lines = lines
        self.shortest = shortest
        self._longest = 2 * shortest  # longer pieces are cut at a line end
        longest_first = sorted(tokens, key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, longest_first))) if tokens else None

    def cut(self, text: str, start: int = 0) -> list[str]:
        """The pieces of `text` from `start` on, where a piece must begin. No piece is empty.

        A longer text that begins with `text` has the same pieces except for the last one.
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
        """Whether `text` may be cut at position `at`, or ends there."""
        if at == len(text) or (self._tokens is not None and self._tokens.match(text, at)):
            return True
        return self.lines and at > 0 and _LINE.match(text, at - 1) is not None

    def settled(self, text: str) -> str:
        """The beginning of `text` whose ids do not depend on any text appended to it."""
        return text[: max((0, *(text.rfind(token) for token in self.tokens)))]

    def _token(self, text: str, start: int) -> int:
        """The position of the first added token from `start` on, or the end of the text."""
        found = None if self._tokens is None else self._tokens.search(text, start)
        return len(text) if found is None else found.start()


def cutter_of(tokenizer: Mapping[str, Any], templates: Iterable[str], *, shortest: int = 64) -> Cutter:
    """The cutter for a tokenizer, which is given as the decoded `tokenizer.json`.

    It cuts at the added tokens that the chat templates contain. If they contain none, it cuts at all safe added tokens
    except numbered ones, which are reserved for later use.
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
    """A component of a tokenizer as a flat list; a `Sequence` contains others."""
    if not isinstance(node, dict):
        return []
    if node.get("type") != "Sequence":
        return [node]
    return [part for inner in node.get(key) or () for part in _parts(inner, key)]


def _is_local(normalizer: Mapping[str, Any]) -> bool:
    if normalizer.get("type") == "Replace":
        # No cut can split a single character.
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
    """The tokens that are always found in full: no flag extends them, and no other token can overlap them."""
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
    """Whether a line break and a following letter are always separated, and each side is encoded independently."""
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
    """Whether an added token may include a line break before a letter: in its text, or by stripping blanks before it."""
    return "\n" in token["content"] or (token["lstrip"] and token["content"][:1].isalpha())


def _alternatives(split: Mapping[str, Any]) -> list[str]:
    """The alternatives of a split pattern, separated at top-level bars; `[""]`, which is never safe, for other splits."""
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
