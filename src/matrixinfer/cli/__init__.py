"""The `matrixinfer` command: one thin module per subcommand."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from matrixinfer import __version__
from matrixinfer.errors import ConfigError, MatrixInferError

COMMANDS = (
    "serve",
    "agent",
    "index",
    "explain",
    "doctor",
    "engine",
    "demo",
    "events",
    "render",
    "tokenize",
    "config",
    "init",
    "completion",
    "keys",
    "replay",
    "tune",
    "calibrate",
)


class _Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line. The usage, which can be half a page, is in `--help`."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse an unknown argument where it stands: argparse would let the outermost command report it."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code of the process."""
    _open_streams()
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # while a closed pipe can still be handled
    except BrokenPipeError:
        _discard_output()  # the reader has closed the pipe
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _discard_output()
        print(f"matrixinfer: cannot write the output: {error.strerror}", file=sys.stderr)
        return 2


def _open_streams() -> None:
    """Give a process that was started with closed standard streams empty ones: Python has None there."""
    given: dict[str, TextIO | None] = {"stdin": sys.stdin, "stdout": sys.stdout, "stderr": sys.stderr}
    for name, stream in given.items():
        if stream is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - it stays open


def _discard_output() -> None:
    """Python flushes standard output once more at exit, which must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser(commands: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser of these commands, whose modules it imports."""
    parser = _Parser(prog="matrixinfer", description="A KV-cache-aware gateway for LLM inference.")
    parser.add_argument("--version", action="version", version=f"matrixinfer {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in commands:
        importlib.import_module(f"matrixinfer.cli.{command}").add_parser(subparsers)
    return parser


def _run(argv: Sequence[str] | None) -> int:
    words = sys.argv[1:] if argv is None else argv
    # To import one command's module is faster than to import all.
    named = words[:1] if words and words[0] in COMMANDS else COMMANDS
    args = build_parser(named).parse_args(words)
    try:
        return int(args.run(args))
    except MatrixInferError as error:
        print(f"matrixinfer: {_file_of(error, args)}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _file_of(error: MatrixInferError, args: argparse.Namespace) -> str:
    """The config file, to put before an error that names a key of it; empty for an error that comes from arguments."""
    file = getattr(args, "config", None)
    if not (isinstance(error, ConfigError) and error.path.startswith("$") and isinstance(file, Path)):
        return ""
    is_named = str(file) in error.message
    is_from_arguments = error.path.startswith("$.pods") and getattr(args, "worker_urls", None)
    return "" if is_named or is_from_arguments else f"{file}: "
