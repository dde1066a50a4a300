"""`matrixinfer serve`: the gateway."""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
import sys
from contextlib import AsyncExitStack

import msgspec
import uvloop

from matrixinfer.app.service import Service
from matrixinfer.cli import engine_arguments
from matrixinfer.cli.arguments import Subparsers
from matrixinfer.config import Config, checked, convert
from matrixinfer.errors import ConfigError
from matrixinfer.scheduler.policies import POLICIES, with_policy
from matrixinfer.telemetry.log import configure


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    serve = subparsers.add_parser(
        "serve",
        help="run the gateway",
        description="Run the gateway, from a config file or from a list of engines. Flags override the file.",
    )
    engine_arguments.add_arguments(serve)
    serve.add_argument("--policy", choices=sorted(POLICIES), help="ready-made scheduler profile (default: kv_aware)")
    serve.add_argument("--host", help="address to listen on")
    serve.add_argument("--port", type=int, help="port to listen on")
    serve.add_argument("--admin", metavar="HOST:PORT", help="address of /debug, or `none`")
    serve.add_argument("--request-timeout-secs", type=float, metavar="S")
    serve.add_argument("--max-payload-size", type=int, metavar="BYTES")
    serve.add_argument("--log-level", choices=["debug", "info", "warning", "error"])
    serve.add_argument("--log-json", action=argparse.BooleanOptionalAction, help="JSON log lines (default), or text")
    serve.set_defaults(run=run)


SWITCH_SECONDS = 0.0005
"""How long a thread that tokenizes may run Python code before the event loop gets its turn; 5 ms is Python's default."""


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT, then drain."""
    config = configuration(args)
    configure(config.log)
    sys.setswitchinterval(SWITCH_SECONDS)
    uvloop.run(_serve(config))
    return 0


async def _serve(config: Config) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(Service(config))
        except OSError as error:
            raise ConfigError("serve", f"cannot listen: {error}") from error
        gc.freeze()  # what is there now stays: without it each full collection stops the loop for several ms longer
        await stop.wait()


def configuration(args: argparse.Namespace) -> Config:
    """The config file, if any, with the flags applied. Raises `ConfigError`."""
    return _with_flags(engine_arguments.configuration(args), args)


def _with_flags(config: Config, args: argparse.Namespace) -> Config:
    replace = msgspec.structs.replace
    if args.policy:
        config = replace(config, scheduler=with_policy(config.scheduler, args.policy))
    host, _, port = config.listen.rpartition(":")
    config = replace(config, listen=f"{args.host or host}:{port if args.port is None else args.port}")
    if args.admin:
        config = replace(config, admin=None if args.admin == "none" else args.admin)
    limits, log = config.limits, config.log
    if args.request_timeout_secs is not None:
        limits = replace(limits, request_timeout_seconds=args.request_timeout_secs)
    if args.max_payload_size is not None:
        limits = replace(limits, max_body_bytes=args.max_payload_size)
    if args.log_level:
        log = replace(log, level=args.log_level)
    if args.log_json is not None:
        log = replace(log, format="json" if args.log_json else "console")
    config = replace(config, limits=limits, log=log)
    return checked(convert(msgspec.to_builtins(config), Config, path="$"))
