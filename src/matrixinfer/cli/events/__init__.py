"""`matrixinfer events`: shows, records and checks the KV events that engines publish."""

from __future__ import annotations

from matrixinfer.cli.arguments import Subparsers
from matrixinfer.cli.events import check, record, tail


def add_parser(subparsers: Subparsers) -> None:
    """Register the commands."""
    events = subparsers.add_parser("events", help="show, record and check the KV events that engines publish")
    commands = events.add_subparsers(title="commands", required=True, metavar="COMMAND")
    tail.add_parser(commands)
    record.add_parser(commands)
    check.add_parser(commands)
