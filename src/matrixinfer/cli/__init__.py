"""The `matrixinfer` command: one thin module per subcommand."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from matrixinfer import __version__
from matrixinfer.errors import MatrixInferError

_COMMANDS = ("serve", "agent", "index", "explain", "doctor", "engine", "demo", "events", "render", "tokenize", "config")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the process's exit code."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # while a closed pipe can still be handled
    except BrokenPipeError:
        # Whoever read has seen enough. Python flushes standard output once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="matrixinfer", description="A KV-cache-aware gateway for LLM inference.")
    parser.add_argument("--version", action="version", version=f"matrixinfer {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        importlib.import_module(f"matrixinfer.cli.{command}").add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except MatrixInferError as error:
        print(f"matrixinfer: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
