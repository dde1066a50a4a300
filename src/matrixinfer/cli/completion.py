"""`matrixinfer completion`: prints what makes a shell complete the commands."""

from __future__ import annotations

import argparse
from pathlib import Path

from matrixinfer.cli.arguments import Subparsers

SHELLS = ("bash", "zsh")


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "completion",
        help="print a script that completes commands in a shell",
        description='Print a script for bash or zsh. For bash, put `eval "$(matrixinfer completion bash)"` into ~/.bashrc. '
        "For zsh, save the output as `_matrixinfer` in a folder of $fpath.",
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    import shtab  # noqa: PLC0415 - only this command needs it

    from matrixinfer.cli import build_parser  # noqa: PLC0415 - which imports this module

    parser = build_parser()
    _complete_files(parser, shtab.FILE)
    print(shtab.complete(parser, args.shell))
    return 0


def _complete_files(parser: argparse.ArgumentParser, how: object) -> None:
    """Let every argument that is a path complete files."""
    for action in parser._actions:  # noqa: SLF001 - as shtab itself does: argparse has no public view of them
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for each in set(action.choices.values()):
                _complete_files(each, how)
        elif action.type is Path:
            action.complete = how  # type: ignore[attr-defined]  # what shtab looks for
