"""`matrixinfer config`: checks and shows a config file, or prints the schema or the reference of all settings."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import yaml

from matrixinfer.app.access_setup import check_secrets
from matrixinfer.app.config_reference import configuration_page
from matrixinfer.app.config_schema import config_schema
from matrixinfer.app.router_setup import build_scheduler
from matrixinfer.cli.arguments import CONFIG_HELP, Subparsers
from matrixinfer.config import Config, load, parse_pods
from matrixinfer.config.shown import shown
from matrixinfer.errors import ConfigError, MatrixInferError
from matrixinfer.prompt import loader
from matrixinfer.scheduler.plugin_loader import Installed, discover


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    config = subparsers.add_parser(
        "config", help="check or show a config file, print its schema or the reference of all settings"
    )
    commands = config.add_subparsers(title="commands", required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check",
        help="check a config file without starting anything",
        description="Read a config file as `serve` does, build its scheduler and load its tokenizers. "
        "Exit code 0 when the file is valid, 2 when it is not, with the first problem found.",
    )
    check.add_argument("config", type=Path, metavar="FILE", help=CONFIG_HELP)
    check.add_argument("--json", action="store_true", help="print the result as JSON")
    check.set_defaults(run=run_check)
    show = commands.add_parser(
        "show",
        help="print the settings in effect, without secrets",
        description="Print every key with the value in effect: from the file, from the environment, or its default. "
        "Secrets are hidden.",
    )
    show.add_argument("config", type=Path, metavar="FILE", help=CONFIG_HELP)
    show.add_argument("--json", action="store_true", help="print JSON instead of YAML")
    show.set_defaults(run=run_show)
    schema = commands.add_parser(
        "schema",
        help="print the JSON Schema of the config file, for editors",
        description="Print the JSON Schema of the config file, with the arguments of all installed plugins. Editors with a "
        "YAML language server read it if the file begins with `# yaml-language-server: $schema=PATH`.",
    )
    schema.set_defaults(run=run_schema)
    reference = commands.add_parser("reference", help="print the reference of all settings as Markdown")
    reference.set_defaults(run=run_reference)


def run_check(args: argparse.Namespace) -> int:
    """Check the file. Without `--json` an invalid file raises `ConfigError` or `TokenizeError`."""
    plugins = discover()
    for name, reason in plugins.broken.items():
        print(f"warning: the installed plugin `{name}` cannot be used: {reason}", file=sys.stderr)
    try:
        config = _checked(args.config, plugins)
    except MatrixInferError as error:
        if not args.json:
            raise
        print(json.dumps({"file": str(args.config), "valid": False, "error": str(error)}))
        return 2
    pods, models = len(config.pods), len(config.models)
    if args.json:
        print(json.dumps({"file": str(args.config), "valid": True, "pods": pods, "models": models}))
    else:
        print(f"{args.config}: valid ({_pods(config)}, models: {models or 'as the engines say'})")
    return 0


def _pods(config: Config) -> str:
    """How many pods the file names, and where others come from if it names none."""
    if config.pods:
        return f"pods: {len(config.pods)}"
    if config.discovery.sources or config.discovery.start_empty:
        return "pods: as discovered"
    return "pods: none, so `serve` needs --worker-urls"


def _checked(file: Path, plugins: Installed) -> Config:
    """The config, after everything was built from it that `serve` would build."""
    config = load(file)
    check_secrets(config)
    build_scheduler(config.scheduler, plugins)
    for i, source in enumerate(config.discovery.files):
        _check_listed(Path(source.path), f"$.discovery.files[{i}]")
    for i, model in enumerate(config.models):
        if model.tokenizer is not None:
            loader.load(model, where=f"$.models[{i}]")
    return config


def _check_listed(file: Path, where: str) -> None:
    """Check a file that lists pods. One that does not exist may come later: that is only a warning."""
    if not file.exists():
        print(f"warning: {where}: {file} does not exist yet", file=sys.stderr)
        return
    try:
        parse_pods(file.read_text(encoding="utf-8"), base=file.parent)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(where, f"cannot read {file}: {error}") from error
    except ConfigError as error:
        raise ConfigError(where, f"{file}: {error}") from error


def run_show(args: argparse.Namespace) -> int:
    """Print the settings in effect. Raises `ConfigError`."""
    settings = shown(load(args.config))
    if args.json:
        print(json.dumps(settings, indent=2, ensure_ascii=False))
    else:
        print(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=1000), end="")
    return 0


def run_schema(_: argparse.Namespace) -> int:
    """Print the schema."""
    print(json.dumps(config_schema(discover()), indent=2, ensure_ascii=False))
    return 0


def run_reference(_: argparse.Namespace) -> int:
    """Print the text of `docs/configuration.md`."""
    print(configuration_page(discover()), end="")
    return 0
