"""What the `index` commands share: arguments, the connection to the server, progress and output."""

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

from matrixinfer.cli.terminal import Terminal
from matrixinfer.config import Config, RedisConfig, checked, load
from matrixinfer.errors import IndexUnavailable
from matrixinfer.index.redis.failures import explained, failure_of
from matrixinfer.index.redis.store import Store

console = Terminal()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every `index` command."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="config file of a gateway, which names the server (default: the environment variables REDIS_HOST, REDIS_PORT "
        "and REDIS_PASSWORD)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def configuration(args: argparse.Namespace) -> Config:
    """The config file. A server that it does not name is taken from the environment. Raises `ConfigError`."""
    config = Config() if args.config is None else load(args.config)
    return checked(msgspec.structs.replace(config, redis=config.redis or RedisConfig()))


@asynccontextmanager
async def server(config: Config) -> AsyncIterator[Store]:
    """Connect to the server. Raises `IndexUnavailable`, also when the server stops answering within the context."""
    store = Store(config.redis or RedisConfig())
    client: Any = store.client
    try:
        async with store:
            await store.ask(client.ping())
            yield store
    except IndexUnavailable as error:
        where, username = store.config.where, store.config.username
        message, fix = explained(failure_of(error), where=where, username=username, error=str(error))
        raise IndexUnavailable(f"{message}. {fix[0].upper()}{fix[1:]}") from error


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar of scanned keys on standard error, if that is a terminal. Yields the callback that advances it."""
    terminal = Console(stderr=True)
    columns = (TextColumn("keys"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=min(done, total))


def print_json(answer: object) -> None:
    """Print the result for programs."""
    print(json.dumps(msgspec.to_builtins(answer), indent=2))


def ago(seconds: float) -> str:
    """A time span for people: `90 s`, `2 min`, `3 h`, `4 d`."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if abs(seconds) >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
