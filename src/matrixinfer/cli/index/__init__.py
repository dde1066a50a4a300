"""`matrixinfer index`: shows the shared index in Redis, and purges entries from it."""

from __future__ import annotations

from matrixinfer.cli.arguments import Subparsers
from matrixinfer.cli.index import purge, show, stats


def add_parser(subparsers: Subparsers) -> None:
    """Register the commands."""
    index = subparsers.add_parser("index", help="show the shared index in Redis, or purge entries from it")
    commands = index.add_subparsers(title="commands", required=True, metavar="COMMAND")
    stats.add_parser(commands)
    show.add_parser(commands)
    purge.add_parser(commands)
