"""`matrixinfer index show`: shows which pods hold one block, or what the index knows about one pod."""

from __future__ import annotations

import argparse
import asyncio
import time

from matrixinfer.cli.arguments import Subparsers, at_least_one
from matrixinfer.cli.index.common import add_arguments, ago, configuration, console, print_json, progress, server
from matrixinfer.cli.terminal import Rows
from matrixinfer.config import Config
from matrixinfer.config.endpoint_names import ENDS_SUFFIX
from matrixinfer.errors import ConfigError
from matrixinfer.index.redis import layout, scan
from matrixinfer.index.redis.purge import names_of
from matrixinfer.index.redis.store import Store
from matrixinfer.index.redis.survey import PodRow, pods, survey


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "show",
        help="show which pods hold a block, or what the index knows about a pod",
        description="Show one block: the pods that hold it, when that was stamped, and whether the entry is valid. Or show "
        "one pod: its writer, the state that the writer reports, and how many of the scanned blocks the pod holds.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="name of the model in the index")
    parser.add_argument("hash", nargs="?", metavar="HASH", help="hash of the block, in decimal digits")
    parser.add_argument("--pod", metavar="NAME", help="show this pod, with its ranks, tiers and ends")
    parser.add_argument(
        "--limit",
        type=at_least_one,
        default=10_000,
        metavar="KEYS",
        help="with --pod, scan about this many keys at most (default: %(default)s)",
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the block or pod. Exit code 1 when the index has none. Raises `ConfigError` or `IndexUnavailable`."""
    if (args.pod is None) == (args.hash is None) or (args.pod is not None and args.model is not None):
        raise ConfigError("MODEL HASH", "expected a model and a hash, or --pod NAME")
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
    key = f"{layout.prefix_of(args.model)}{int(args.hash)}"
    stamps = layout.named(await store.table(key))
    shown = {pod: None if at == layout.UNDATED else at for pod, at in stamps.items()}
    rows, now, max_age = await pods(store), time.time(), config.index.max_age_seconds
    invalid = {pod: _why_invalid(at, rows.get(pod), now=now, max_age=max_age) for pod, at in stamps.items()}
    if args.json:
        holders = {
            pod: {"stamp": at, "valid": invalid[pod] is None, "reason": invalid[pod]} for pod, at in shown.items()
        }
        print_json({"key": key, "holders": holders})
    elif not stamps:
        is_hash = key not in store.unreadable_keys
        console.print(f"{key}: {'no pod holds this block' if is_hash else 'holds something else than a hash'}")
    else:
        table = Rows("pod", "stamp", "age", "valid", "reason")
        for pod, at in sorted(shown.items()):
            when = ("-", "-") if at is None else (str(at), ago(now - at))
            table.add_row(pod, *when, "no" if invalid[pod] else "yes", invalid[pod] or "")
        console.print(key)
        console.print(table)
    return 0 if stamps else 1


def _why_invalid(at: int, row: PodRow | None, *, now: float, max_age: float) -> str | None:
    """Why an entry is invalid; None when it is valid."""
    epoch, alive = (0, False) if row is None else (row.epoch or 0, row.alive)
    if at == layout.UNDATED:
        return None if row is None or not row.is_ruled else "its stamp cannot be read"
    if at < epoch:
        return f"stamped before the pod's epoch {epoch}"
    if at < layout.floor_of(now=now, epoch=epoch, lease=now if alive else 0, max_age=max_age):
        return "too old, and the pod has no live writer"
    return None


async def _show_pod(args: argparse.Namespace, config: Config, store: Store) -> int:
    with progress(min(args.limit, await scan.size(store))) as advance:
        found = await survey(store, max_age=config.index.max_age_seconds, limit=args.limit, progress=advance)
    holders = {pod for model in found.models.values() for pod in (*model.pods, *model.ends)}
    names = [name for name in names_of(args.pod, sorted({*found.pods, *holders})) if name in {*found.pods, *holders}]
    blocks = sum(model.blocks for model in found.models.values())
    if args.json:
        shown = {name: {"record": found.pods.get(name), "blocks": found.held(name)} for name in names}
        print_json({"pods": shown, "blocks_scanned": blocks, "complete": found.complete})
    elif not names:
        console.print(f"{args.pod}: no writer has ever written for it, and it holds none of {blocks:,} blocks scanned")
    for name in [] if args.json else names:
        held = f"{found.held(name):,}"
        of_all = f" of {blocks:,} blocks{'' if found.complete else ' scanned'}"
        console.print(
            f"{name}: {held} marks of ends" if name.endswith(ENDS_SUFFIX) else f"{name}: holds {held}{of_all}"
        )
        if name in found.pods:
            _print_row(found.pods[name])
    return 0 if names else 1


def _print_row(row: PodRow) -> None:
    lease = row.lease_seconds if row.alive else "expired"
    console.print(f"  writer {row.writer or '-'}, lease_seconds {lease}, token {row.token or '-'}")
    stamped = "-" if row.last_stamp is None else f"{row.last_stamp}, {ago(time.time() - row.last_stamp)} ago"
    console.print(f"  epoch {row.epoch or '-'}, last_stamp {stamped}")
    if row.state is not None:
        state = row.state
        console.print(
            f"  trust {state.trust}, feed {state.feed}, model {state.model}, engine_block {state.engine_block or '-'}"
        )
        if state.reason is not None:
            console.print(f"  reason {state.reason}")
        for words in state.limits:
            console.print(f"  limit {words}")
