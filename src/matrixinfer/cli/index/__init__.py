"""`matrixinfer index`: looks at the shared index in Redis, and purges what should not be there."""

from __future__ import annotations

from matrixinfer.cli.arguments import Subparsers
from matrixinfer.cli.index import purge, show, stats


def add_parser(subparsers: Subparsers) -> None:
    """Register the commands."""
    index = subparsers.add_parser("index", help="look at the shared index in Redis, or purge it")
    commands = index.add_subparsers(title="commands", required=True, metavar="COMMAND")
    stats.add_parser(commands)
    show.add_parser(commands)
    purge.add_parser(commands)
