"""`matrixinfer index purge`: takes a pod's entries or a model's blocks out of the shared index."""

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
        help="take a pod's entries or a model's blocks out of the index",
        description="Let nothing of a pod count that was written until now, or delete the blocks of a model. Writers that are "
        "alive find out within seconds and write anew what their engines hold; stop them first if that is not wanted.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pod", metavar="NAME", help="this pod, with its ranks and tiers; takes no time")
    what.add_argument("--model", metavar="NAME", help="the index's name of a model; looks at every key")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--yes", action="store_true", help="do it")
    how.add_argument("--dry-run", action="store_true", help="only tell what would be done")
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Purge and tell. Raises `ConfigError` or `IndexUnavailable`."""
    if not (args.yes or args.dry_run):
        raise ConfigError("purge", "give --yes to do it, or --dry-run to be told what would be done")
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
    alive = _alive({name: known[name] for name in names if name in known})
    if args.json:
        print_json({"pods": names, "epochs": epochs, "living_writers": alive, "dry_run": args.dry_run})
        return
    for name in names:
        if args.dry_run:
            console.print(f"{name}: whatever was stamped until now would count no more")
        else:
            console.print(f"{name}: what was stamped before {epochs[name]} counts no more")
        if name not in known:
            console.print("  no writer has told of it")
    _tell_of_living(alive)


async def _purge_model(args: argparse.Namespace, store: Store) -> None:
    with progress(await scan.size(store)) as told:
        blocks = await purge_model(store, args.model, dry_run=args.dry_run, progress=told)
    alive = _alive(await pods(store))
    if not args.dry_run:
        await take_tokens(store, alive)
    if args.json:
        print_json({"model": args.model, "blocks": blocks, "living_writers": alive, "dry_run": args.dry_run})
        return
    console.print(f"{args.model}: {blocks:,} blocks {'would be' if args.dry_run else 'were'} deleted")
    _tell_of_living(alive)


def _alive(rows: dict[str, PodRow]) -> list[str]:
    return [name for name, row in rows.items() if row.alive]


def _tell_of_living(names: list[str]) -> None:
    if names:
        console.print(f"Alive are the writers of {', '.join(names)}: they write anew what their engines hold.")
