"""`matrixinfer config`: checks a config file, or prints the reference of all settings."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from matrixinfer.app.access_setup import check_secrets
from matrixinfer.app.config_reference import configuration_page
from matrixinfer.app.service import build_scheduler
from matrixinfer.cli.arguments import CONFIG_HELP, Subparsers
from matrixinfer.config import Config, load
from matrixinfer.errors import MatrixInferError
from matrixinfer.prompt import loader
from matrixinfer.scheduler.plugin_loader import Installed, discover


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    config = subparsers.add_parser("config", help="check a config file, or print the reference of all settings")
    commands = config.add_subparsers(title="commands", required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check",
        help="check a config file without starting anything",
        description="Read a config file as `serve` does, build its scheduler and load its tokenizers. "
        "Exit code 0 when the file is valid, 2 when it is not, with the first problem found.",
    )
    check.add_argument("file", type=Path, metavar="FILE", help=CONFIG_HELP)
    check.add_argument("--json", action="store_true", help="print the result as JSON")
    check.set_defaults(run=run_check)
    reference = commands.add_parser("reference", help="print the reference of all settings as Markdown")
    reference.set_defaults(run=run_reference)


def run_check(args: argparse.Namespace) -> int:
    """Check the file. Without `--json` an invalid file raises `ConfigError` or `TokenizeError`."""
    plugins = discover()
    for name, reason in plugins.broken.items():
        print(f"warning: the installed plugin `{name}` cannot be used: {reason}", file=sys.stderr)
    try:
        config = _checked(args.file, plugins)
    except MatrixInferError as error:
        if not args.json:
            raise
        print(json.dumps({"file": str(args.file), "valid": False, "error": str(error)}))
        return 2
    pods, models = len(config.pods), len(config.models)
    if args.json:
        print(json.dumps({"file": str(args.file), "valid": True, "pods": pods, "models": models}))
    else:
        print(f"{args.file}: valid (pods: {pods}, models: {models})")
    return 0


def _checked(file: Path, plugins: Installed) -> Config:
    """The config, after everything was built from it that `serve` would build."""
    config = load(file)
    check_secrets(config)
    build_scheduler(config.scheduler, plugins)
    for i, model in enumerate(config.models):
        if model.tokenizer is not None:
            loader.load(model, where=f"$.models[{i}]")
    return config


def run_reference(_: argparse.Namespace) -> int:
    """Print the text of `docs/configuration.md`."""
    print(configuration_page(discover()), end="")
    return 0
