"""`matrixinfer index`: looks at the shared index in Redis, and purges what should not be there."""

from __future__ import annotations

from matrixinfer.cli import index_purge, index_show, index_stats
from matrixinfer.cli.arguments import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Register the commands."""
    index = subparsers.add_parser("index", help="look at the shared index in Redis, or purge it")
    commands = index.add_subparsers(title="commands", required=True, metavar="COMMAND")
    index_stats.add_parser(commands)
    index_show.add_parser(commands)
    index_purge.add_parser(commands)
