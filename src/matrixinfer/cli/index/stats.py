"""`matrixinfer index stats`: counts the blocks in the shared index by model and pod, and shows their writers."""

from __future__ import annotations

import argparse
import asyncio
import time

from matrixinfer.cli.arguments import Subparsers, at_least_one
from matrixinfer.cli.index.common import add_arguments, ago, configuration, console, print_json, progress, server
from matrixinfer.cli.terminal import Rows
from matrixinfer.index.redis import scan
from matrixinfer.index.redis.survey import Survey, survey


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "stats",
        help="count the blocks in the index, and show their writers",
        description="Count the blocks of every model and pod, valid and stale ones, and show the writers of each pod. "
        "Scans every key once, a page at a time. A stale entry is too old, or stamped before its pod's epoch.",
    )
    parser.add_argument(
        "--limit",
        type=at_least_one,
        default=1_000_000,
        metavar="KEYS",
        help="scan about this many keys at most (default: %(default)s)",
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Count the blocks and print the result. Raises `IndexUnavailable`."""
    found = asyncio.run(_survey(args))
    if args.json:
        print_json(found)
    else:
        _print(found)
    return 0


async def _survey(args: argparse.Namespace) -> Survey:
    config = configuration(args)
    async with server(config) as store:
        with progress(min(args.limit, await scan.size(store))) as advance:
            return await survey(store, max_age=config.index.max_age_seconds, limit=args.limit, progress=advance)


def _print(found: Survey) -> None:
    used = "" if found.used_bytes is None else f", {found.used_bytes / 2**20:,.1f} MiB used"
    console.print(f"{found.server}: {found.keys:,} keys{used}")
    if not found.complete:
        console.print(f"Only about {found.looked_at:,} keys were scanned: more blocks exist. Use --limit to scan more.")
    models = Rows("model", "blocks", "entries", "stale", "pods", "ends", "block_size", "hash_scheme", "bytes_per_block")
    for name, model in sorted(found.models.items()):
        size = "-" if model.bytes_per_block is None else f"{model.bytes_per_block:,.0f}"
        scheme = (model.scheme.get(key, "-") for key in ("block_size", "hash_scheme"))
        counts = (model.blocks, model.entries, model.stale, len(model.pods), sum(model.ends.values()))
        models.add_row(name, *(f"{count:,}" for count in counts), *scheme, size)
    console.print(models)
    now = time.time()
    pods = Rows("pod", "blocks", "writer", "lease_seconds", "trust", "feed", "epoch", "last_stamp")
    for name in sorted({*found.pods, *(pod for model in found.models.values() for pod in model.pods)}):
        row = found.pods.get(name)
        if row is None:
            pods.add_row(name, f"{found.held(name):,}", *("-",) * 6)
            continue
        pods.add_row(
            name,
            f"{found.held(name):,}",
            (row.writer or "-")[:12],
            str(row.lease_seconds) if row.alive else "expired",
            "-" if row.state is None else row.state.trust,
            "-" if row.state is None else row.state.feed,
            "-" if row.epoch is None else str(row.epoch),
            "-" if row.last_stamp is None else f"{ago(now - row.last_stamp)} ago",
        )
    console.print(pods)
