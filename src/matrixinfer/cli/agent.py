"""`matrixinfer agent`: follows engines' KV events and writes their cached blocks into Redis."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import msgspec

from matrixinfer.app.agent import Agent
from matrixinfer.app.systemd import Notifier
from matrixinfer.cli.arguments import CONFIG_HELP, Subparsers
from matrixinfer.cli.running import run_to_the_end, run_until_stopped
from matrixinfer.config import CLUSTER_SUFFIX, Config, DiscoveryConfig, RedisConfig, checked, load
from matrixinfer.errors import ConfigError
from matrixinfer.index.redis.dry_run import DryRunIndex
from matrixinfer.telemetry.log import configure


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "agent",
        help="write the blocks that engines cache into Redis",
        description="Follow the KV events of engines and write the blocks that they cache into the Redis or Valkey "
        "server that the config file names. Gateways with `index.kind: redis` read them there. The agent can use the "
        "gateways' own config file. It runs until SIGTERM or Ctrl-C.",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help=CONFIG_HELP)
    parser.add_argument(
        "--pod",
        action="append",
        default=[],
        metavar="NAME",
        help="follow only this pod of the config file; may be repeated (default: all pods)",
    )
    parser.add_argument(
        "--listen",
        default="127.0.0.1:8082",
        metavar="HOST:PORT",
        help="address that serves /health, /ready and /metrics, or `none` (default: %(default)s)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the Redis commands instead of sending them",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Follow the engines until SIGTERM or SIGINT."""
    config = configuration(args)
    configure(config.log)
    agent = Agent(
        config,
        listen=None if args.listen == "none" else args.listen,
        dry_run=DryRunIndex(_print_line) if args.dry_run else None,
    )
    run_to_the_end(run_until_stopped(agent, path="--listen", notifier=Notifier(os.environ, os.getpid())))
    return 0


def configuration(args: argparse.Namespace) -> Config:
    """The config file, reduced to the pods that `--pod` selects. Raises `ConfigError`."""
    config = load(args.config)
    names = [pod.name for pod in config.pods]
    wanted = [name.removesuffix(CLUSTER_SUFFIX) for name in args.pod]
    for name in wanted:
        if name not in names:
            raise ConfigError(
                "--pod", f"expected a pod of the config file ({', '.join(names) or 'it has none'}), got `{name}`"
            )
    pods = tuple(pod for pod in config.pods if not args.pod or pod.name in wanted)
    if args.pod:
        config = msgspec.structs.replace(config, discovery=DiscoveryConfig())  # those of the file, and no others
    if not pods and not config.discovery.sources:
        raise ConfigError("$.pods", "expected at least one pod to follow, got none")
    return checked(msgspec.structs.replace(config, pods=pods, redis=config.redis or RedisConfig()))


def _print_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
