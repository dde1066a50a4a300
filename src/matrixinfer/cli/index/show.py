"""`matrixinfer index show`: who holds one block, or what is known of one pod."""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

from rich.table import Table

from matrixinfer.cli.arguments import Subparsers, at_least_one
from matrixinfer.cli.index.common import add_arguments, ago, configuration, console, print_json, progress, server
from matrixinfer.config import Config
from matrixinfer.errors import ConfigError
from matrixinfer.index.redis import layout, scan
from matrixinfer.index.redis.purge import names_of
from matrixinfer.index.redis.store import Store
from matrixinfer.index.redis.survey import PodRow, pods, survey


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "show",
        help="who holds a block, or what is known of a pod",
        description="Show the holders of one block, with their stamps and whether they count, or one pod: its writer, what "
        "that tells of it, and how many of the first blocks that come it holds.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="the index's name of the model")
    parser.add_argument("hash", nargs="?", metavar="HASH", help="the block's hash, in decimal digits")
    parser.add_argument("--pod", metavar="NAME", help="show this pod, with its ranks and tiers")
    parser.add_argument(
        "--limit",
        type=at_least_one,
        default=10_000,
        metavar="KEYS",
        help="with --pod, look at about so many keys at most (%(default)s)",
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask and print; 1 when there is no such thing. Raises `ConfigError` or `IndexUnavailable`."""
    if (args.pod is None) == (args.hash is None) or (args.pod is not None and args.model is not None):
        raise ConfigError("MODEL HASH", "give a model and a hash, or --pod NAME")
    if args.hash is not None and not args.hash.isdecimal():
        raise ConfigError("HASH", f"expected decimal digits, got `{args.hash}`")
    return asyncio.run(_show(args))


async def _show(args: argparse.Namespace) -> int:
    config = configuration(args)
    async with server(config) as store:
        if args.pod is not None:
            return await _show_pod(args, config, store)
        return await _show_block(args, config, store)


async def _show_block(args: argparse.Namespace, config: Config, store: Store) -> int:
    client: Any = store.client
    key = f"{layout.prefix_of(args.model)}{int(args.hash)}"
    stamps = layout.named(await store.ask(client.hgetall(key)))
    rows, now, max_age = await pods(store), time.time(), config.index.max_age_seconds
    why = {pod: _stale(at, rows.get(pod), now=now, max_age=max_age) for pod, at in stamps.items()}
    if args.json:
        holders = {pod: {"stamp": at, "counts": why[pod] is None, "why_not": why[pod]} for pod, at in stamps.items()}
        print_json({"key": key, "holders": holders})
    elif not stamps:
        console.print(f"{key}: nobody holds it")
    else:
        table = Table("pod", "stamp", "age", "counts", box=None)
        for pod, at in sorted(stamps.items()):
            table.add_row(pod, str(at), ago(now - at), "yes" if why[pod] is None else f"no: {why[pod]}")
        console.print(key)
        console.print(table)
    return 0 if stamps else 1


def _stale(at: int, row: PodRow | None, *, now: float, max_age: float) -> str | None:
    """Why an entry does not count; None where it does."""
    epoch, alive = (0, False) if row is None else (row.epoch or 0, row.alive)
    if at < epoch:
        return f"stamped before the pod's epoch {epoch}"
    if at < layout.floor_of(now=now, epoch=epoch, lease=now if alive else 0, max_age=max_age):
        return "too old, and no writer vouches for the pod"
    return None


async def _show_pod(args: argparse.Namespace, config: Config, store: Store) -> int:
    with progress(min(args.limit, await scan.size(store))) as told:
        found = await survey(store, max_age=config.index.max_age_seconds, limit=args.limit, progress=told)
    holders = {pod for model in found.models.values() for pod in model.pods}
    names = [name for name in names_of(args.pod, sorted({*found.pods, *holders})) if name in {*found.pods, *holders}]
    blocks = sum(model.blocks for model in found.models.values())
    if args.json:
        shown = {name: {"tables": found.pods.get(name), "blocks": found.held(name)} for name in names}
        print_json({"pods": shown, "blocks_looked_at": blocks, "complete": found.complete})
    elif not names:
        console.print(f"{args.pod}: no writer has told of it, and none of {blocks:,} blocks looked at is its")
    for name in [] if args.json else names:
        console.print(
            f"{name}: holds {found.held(name):,} of {blocks:,} blocks{'' if found.complete else ' looked at'}"
        )
        if name in found.pods:
            _print_row(found.pods[name])
    return 0 if names else 1


def _print_row(row: PodRow) -> None:
    lease = "over" if not row.alive else f"{row.lease_seconds} s"
    console.print(f"  writer {row.writer or '-'}, lease {lease}, token {row.token or '-'}")
    stamped = "-" if row.last_stamp is None else f"{row.last_stamp}, {ago(time.time() - row.last_stamp)} ago"
    console.print(f"  epoch {row.epoch or '-'}, last stamp {stamped}")
    if row.state is not None:
        state = row.state
        console.print(
            f"  trust {state.trust}, feed {state.feed}, model {state.model}, engine block {state.engine_block or '-'}"
        )
        if state.reason is not None:
            console.print(f"  not believed: {state.reason}")
