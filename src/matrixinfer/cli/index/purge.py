"""`matrixinfer index purge`: invalidates a pod's entries in the shared index, or deletes a model's blocks."""

from __future__ import annotations

import argparse
import asyncio

from matrixinfer.cli.arguments import Subparsers
from matrixinfer.cli.index.common import add_arguments, configuration, console, print_json, progress, server
from matrixinfer.errors import ConfigError
from matrixinfer.index.redis import scan
from matrixinfer.index.redis.purge import names_of, purge_model, purge_pod, take_tokens
from matrixinfer.index.redis.store import Store
from matrixinfer.index.redis.survey import PodRow, pods


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "purge",
        help="invalidate a pod's entries, or delete a model's blocks",
        description="Invalidate everything that was written for a pod until now, or delete the blocks of a model. Live "
        "writers notice within seconds and write again what their engines cache: stop them first to prevent that.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--pod", metavar="NAME", help="invalidate the entries of this pod, its ranks, tiers and ends; immediate"
    )
    what.add_argument(
        "--model", metavar="NAME", help="delete the blocks of this model, by its name in the index; scans every key"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--yes", action="store_true", help="purge")
    how.add_argument("--dry-run", action="store_true", help="only show what would be purged")
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Purge and print the result. Raises `ConfigError` or `IndexUnavailable`."""
    if not (args.yes or args.dry_run):
        raise ConfigError("purge", "expected --yes to purge, or --dry-run to see what would be purged")
    asyncio.run(_purge(args))
    return 0


async def _purge(args: argparse.Namespace) -> None:
    async with server(configuration(args)) as store:
        if args.pod is not None:
            await _purge_pod(args, store)
        else:
            await _purge_model(args, store)


async def _purge_pod(args: argparse.Namespace, store: Store) -> None:
    known = await pods(store)
    names = names_of(args.pod, known)
    epochs = {} if args.dry_run else {name: await purge_pod(store, name) for name in names}
    live = _live({name: known[name] for name in names if name in known})
    if args.json:
        print_json({"pods": names, "epochs": epochs, "live_writers": live, "dry_run": args.dry_run})
        return
    for name in names:
        if args.dry_run:
            console.print(f"{name}: entries stamped until now would be invalid")
        else:
            console.print(f"{name}: entries stamped before {epochs[name]} are now invalid")
        if name not in known:
            console.print("  no writer has ever written for it")
    _print_live(live)


async def _purge_model(args: argparse.Namespace, store: Store) -> None:
    with progress(await scan.size(store)) as advance:
        blocks = await purge_model(store, args.model, dry_run=args.dry_run, progress=advance)
    live = _live(await pods(store))
    if not args.dry_run:
        await take_tokens(store, live)
    if args.json:
        print_json({"model": args.model, "blocks": blocks, "live_writers": live, "dry_run": args.dry_run})
        return
    console.print(f"{args.model}: {blocks:,} blocks {'would be' if args.dry_run else 'were'} deleted")
    _print_live(live)


def _live(rows: dict[str, PodRow]) -> list[str]:
    return [name for name, row in rows.items() if row.alive]


def _print_live(names: list[str]) -> None:
    if names:
        console.print(f"Writers of {', '.join(names)} are alive: they write again what their engines cache.")
