"""`matrixinfer config`: checks a config file, prints the reference."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from matrixinfer.app.config_reference import configuration_page
from matrixinfer.app.service import build_scheduler
from matrixinfer.cli.arguments import Subparsers
from matrixinfer.config import load
from matrixinfer.prompt import loader
from matrixinfer.scheduler.plugin_loader import discover


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    config = subparsers.add_parser("config", help="check a config file, or print the reference")
    commands = config.add_subparsers(title="commands", required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="check a config file without starting anything")
    check.add_argument("file", type=Path, metavar="FILE")
    check.set_defaults(run=run_check)
    reference = commands.add_parser("reference", help="print the reference of all settings as Markdown")
    reference.set_defaults(run=run_reference)


def run_check(args: argparse.Namespace) -> int:
    """Raise `ConfigError` when the file does not hold."""
    config = load(args.file)
    plugins = discover()
    for name, reason in plugins.broken.items():
        print(f"warning: the installed plugin `{name}` cannot be used: {reason}", file=sys.stderr)
    build_scheduler(config.scheduler, plugins)
    for i, model in enumerate(config.models):
        if model.tokenizer is not None:
            loader.load(model, where=f"$.models[{i}]")
    print(f"{args.file}: good (pods: {len(config.pods)}, models: {len(config.models)})")
    return 0


def run_reference(_: argparse.Namespace) -> int:
    """Print the page that `docs/configuration.md` holds."""
    print(configuration_page(discover()), end="")
    return 0
