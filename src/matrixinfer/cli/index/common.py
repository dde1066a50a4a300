"""What the commands that look at the shared index have in common: which server, and how far they are."""

from __future__ import annotations

import argparse
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from matrixinfer.cli.arguments import WIDTH
from matrixinfer.config import Config, RedisConfig, checked, load
from matrixinfer.errors import IndexUnavailable
from matrixinfer.index.redis.store import Store

console = Console(highlight=False, soft_wrap=True, width=WIDTH)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a gateway's config file; without it the environment's REDIS_HOST, REDIS_PORT and REDIS_PASSWORD",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def configuration(args: argparse.Namespace) -> Config:
    """The config file, with a server in any case. Raises `ConfigError`."""
    config = Config() if args.config is None else load(args.config)
    return checked(msgspec.structs.replace(config, redis=config.redis or RedisConfig()))


@asynccontextmanager
async def server(config: Config) -> AsyncIterator[Store]:
    """A server that answers. Raises `IndexUnavailable`, also where it stops to answer within the context."""
    store = Store(config.redis or RedisConfig())
    client: Any = store.client
    try:
        async with store:
            await store.ask(client.ping())
            yield store
    except IndexUnavailable as error:
        raise IndexUnavailable(f"Redis at {store.config.where} does not answer: {error}") from error


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar of keys on standard error while the context lasts, on a terminal only."""
    terminal = Console(stderr=True)
    columns = (TextColumn("keys"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=min(done, total))


def print_json(answer: object) -> None:
    """For programs."""
    print(json.dumps(msgspec.to_builtins(answer), indent=2))


def ago(seconds: float) -> str:
    """A time that has passed, for people."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if abs(seconds) >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
