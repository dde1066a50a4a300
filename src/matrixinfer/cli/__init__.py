"""The `matrixinfer` command: one thin module per subcommand."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from matrixinfer import __version__
from matrixinfer.errors import MatrixInferError

COMMANDS = ("serve", "agent", "index", "explain", "doctor", "engine", "demo", "events", "render", "tokenize", "config")


class _Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line. The usage, which can be half a page, is in `--help`."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code of the process."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # while a closed pipe can still be handled
    except BrokenPipeError:
        # The reader has closed the pipe. Python flushes standard output again at exit, which must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(argv: Sequence[str] | None) -> int:
    parser = _Parser(prog="matrixinfer", description="A KV-cache-aware gateway for LLM inference.")
    parser.add_argument("--version", action="version", version=f"matrixinfer {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        importlib.import_module(f"matrixinfer.cli.{command}").add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except MatrixInferError as error:
        print(f"matrixinfer: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
