"""`matrixinfer events`: looks at KV events as engines publish them."""

from __future__ import annotations

from matrixinfer.cli import events_check, events_record, events_tail
from matrixinfer.cli.arguments import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Register the commands."""
    events = subparsers.add_parser("events", help="look at KV events as engines publish them")
    commands = events.add_subparsers(title="commands", required=True, metavar="COMMAND")
    events_tail.add_parser(commands)
    events_record.add_parser(commands)
    events_check.add_parser(commands)
