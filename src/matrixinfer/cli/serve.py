"""`matrixinfer serve`: the gateway."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from functools import partial

import msgspec
import structlog

from matrixinfer.app.service import Service
from matrixinfer.app.systemd import Notifier
from matrixinfer.app.workers.supervisor import Supervisor
from matrixinfer.app.workers.worker import from_environment
from matrixinfer.cli import engine_arguments
from matrixinfer.cli.arguments import Subparsers, at_least_one, duration, port
from matrixinfer.cli.running import run_to_the_end, run_until_stopped
from matrixinfer.config import Config, checked, convert, split_address
from matrixinfer.gateway import descriptors
from matrixinfer.scheduler.policies import POLICIES, with_policy
from matrixinfer.telemetry.log import configure

SWITCH_SECONDS = 0.0005
"""How long a tokenizing thread may run Python code before the event loop gets a turn. Python's default is 5 ms."""


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    serve = subparsers.add_parser(
        "serve",
        help="run the gateway",
        description="Run the gateway until SIGTERM or Ctrl-C. Engines come from a config file or from --worker-urls; "
        "the other options override the file.",
    )
    engine_arguments.add_arguments(serve)
    serve.add_argument(
        "--policy",
        choices=sorted(POLICIES),
        help="ready-made scheduler profile (default: the config file's, or kv_aware)",
    )
    serve.add_argument("--host", help="address to listen on (default: the config file's)")
    serve.add_argument("--port", type=port, help="port to listen on, 0 for any free one (default: the config file's)")
    serve.add_argument(
        "--workers",
        type=at_least_one,
        metavar="N",
        help="number of processes that serve the address (default: the config file's, or 1)",
    )
    serve.add_argument(
        "--admin", metavar="HOST:PORT", help="address that serves /debug, or `none` (default: the config file's)"
    )
    serve.add_argument(
        "--request-timeout-secs", type=duration, metavar="S", help="end a request whose pod sends nothing for S seconds"
    )
    serve.add_argument(
        "--max-payload-size", type=at_least_one, metavar="BYTES", help="largest request body that is accepted"
    )
    serve.add_argument(
        "--log-level", choices=["debug", "info", "warning", "error"], help="least severe log lines to write"
    )
    serve.add_argument(
        "--log-json", action=argparse.BooleanOptionalAction, help="log lines as JSON (default) or as text"
    )
    serve.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT, then let requests in flight finish."""
    worker = from_environment(os.environ)
    config = configuration(args) if worker is None else worker.configuration()
    log_stream = configure(config.log)
    descriptors.raise_limit()
    if worker is None and config.workers > 1:
        return _supervise(config, args)
    sys.setswitchinterval(SWITCH_SECONDS)
    notifier = Notifier(os.environ, os.getpid())
    if worker is None:
        read = partial(configuration, args)
        service = Service(config, log_stream, notifier=notifier, read=read, config_file=args.config)
    else:
        structlog.contextvars.bind_contextvars(worker=worker.number)
        service = Service(config, log_stream, notifier=notifier, read=worker.configuration, worker=worker)
    run_to_the_end(
        run_until_stopped(
            service,
            path="--port, --admin",
            on_started=gc.freeze,  # start-up objects live on: collecting them would pause the loop for several ms
            on_terminated=service.delay_drain,
            on_hangup=service.reload_soon,
            notifier=notifier,
        )
    )
    return 0


def _supervise(config: Config, args: argparse.Namespace) -> int:
    notifier = Notifier(os.environ, os.getpid())

    async def supervise() -> None:
        read = partial(configuration, args)
        supervisor = Supervisor(config, read=read, config_file=args.config, notifier=notifier)
        await run_until_stopped(
            supervisor,
            path="--port, --admin",
            on_terminated=supervisor.delay_drain,
            on_hangup=supervisor.reload_soon,
            notifier=notifier,
        )

    run_to_the_end(supervise())
    return 0


def configuration(args: argparse.Namespace) -> Config:
    """The config file, if any, with the command line applied. Raises `ConfigError`."""
    return _with_flags(engine_arguments.configuration(args), args)


def _with_flags(config: Config, args: argparse.Namespace) -> Config:
    replace = msgspec.structs.replace
    if args.policy:
        config = replace(config, scheduler=with_policy(config.scheduler, args.policy))
    host, _, old_port = config.listen.rpartition(":")
    config = replace(config, listen=f"{args.host or host}:{old_port if args.port is None else args.port}")
    if args.admin:
        if args.admin != "none":
            split_address(args.admin, path="--admin")
        config = replace(config, admin=None if args.admin == "none" else args.admin)
    if args.workers is not None:
        config = replace(config, workers=args.workers)
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
