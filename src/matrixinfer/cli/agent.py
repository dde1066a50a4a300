"""`matrixinfer agent`: beside engines, writes what they hold into Redis."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import uvloop

from matrixinfer.app.agent import Agent
from matrixinfer.cli.arguments import Subparsers
from matrixinfer.config import Config, RedisConfig, checked, load
from matrixinfer.errors import ConfigError
from matrixinfer.index.redis.dry_run import DryRunIndex
from matrixinfer.telemetry.log import configure


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "agent",
        help="write what engines hold into Redis",
        description="Follow the KV events of engines and write what they hold into the Redis or Valkey server of the "
        "config file, for gateways with `index.kind: redis`. The gateways' config file will do.",
    )
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="YAML file; see docs/configuration.md"
    )
    parser.add_argument(
        "--pod",
        action="append",
        default=[],
        metavar="NAME",
        help="only this pod of the file; may be given more than once",
    )
    parser.add_argument(
        "--listen",
        default="127.0.0.1:8082",
        metavar="HOST:PORT",
        help="address of /health, /ready and /metrics, or `none` (%(default)s)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the blocks that would be written, until ended, and do not ask Redis",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Follow until SIGTERM or SIGINT."""
    config = configuration(args)
    configure(config.log)
    uvloop.run(_follow(config, args))
    return 0


def configuration(args: argparse.Namespace) -> Config:
    """The config file, with the pods that were asked for. Raises `ConfigError`."""
    config = load(args.config)
    names = [pod.name for pod in config.pods]
    for name in args.pod:
        if name not in names:
            raise ConfigError("--pod", f"`{name}` is not among {', '.join(names) or 'the pods, as there are none'}")
    pods = tuple(pod for pod in config.pods if not args.pod or pod.name in args.pod)
    if not pods:
        raise ConfigError("$.pods", "no engines to follow")
    return checked(msgspec.structs.replace(config, pods=pods, redis=config.redis or RedisConfig()))


async def _follow(config: Config, args: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    dry_run = DryRunIndex(_say) if args.dry_run else None
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(
                Agent(config, listen=None if args.listen == "none" else args.listen, dry_run=dry_run)
            )
        except OSError as error:
            raise ConfigError("--listen", f"cannot listen: {error}") from error
        await stop.wait()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
