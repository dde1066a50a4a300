"""`matrixinfer serve`: the gateway."""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import uvloop

from matrixinfer.cli.arguments import Subparsers
from matrixinfer.config import Config, KvEventsConfig, ModelConfig, PodConfig, checked, convert, load
from matrixinfer.errors import ConfigError
from matrixinfer.policies import POLICIES, with_policy
from matrixinfer.service import Service
from matrixinfer.telemetry.log import configure


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    serve = subparsers.add_parser(
        "serve",
        help="run the gateway",
        description="Run the gateway, from a config file or from a list of engines. Flags override the file.",
    )
    serve.add_argument("--config", type=Path, metavar="FILE", help="YAML file; see docs/configuration.md")
    serve.add_argument("--worker-urls", nargs="+", default=[], metavar="URL", help="base URLs of the engines")
    serve.add_argument(
        "--kv-event-source",
        action="append",
        default=[],
        metavar="URL=tcp://…",
        help="where the engine at URL publishes its KV events (default: its own /kv_event_sources says)",
    )
    serve.add_argument(
        "--kv-event-replay-source",
        action="append",
        default=[],
        metavar="URL=tcp://…",
        help="where the engine at URL replays them",
    )
    serve.add_argument("--policy", choices=sorted(POLICIES), help="ready-made scheduler profile (default: kv_aware)")
    serve.add_argument("--model", metavar="NAME", help="with --tokenizer-path: the engines' name of their model")
    serve.add_argument("--tokenizer-path", type=Path, metavar="PATH", help="directory or tokenizer.json of that model")
    serve.add_argument("--chat-template", metavar="FILE", help="its chat template, or `chatml`")
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
    config = load(args.config) if args.config else Config()
    if args.worker_urls:
        if config.pods:
            raise ConfigError("--worker-urls", "the config file names pods already")
        pods = _pods(args.worker_urls, args.kv_event_source, args.kv_event_replay_source)
        config = msgspec.structs.replace(config, pods=pods)
    elif args.kv_event_source or args.kv_event_replay_source:
        raise ConfigError("--kv-event-source", "goes with --worker-urls; in a config file use `kvEvents`")
    if not config.pods:
        raise ConfigError("$.pods", "no engines: name them in --config FILE or with --worker-urls URL …")
    if args.tokenizer_path or args.chat_template:
        if not (args.model and args.tokenizer_path):
            raise ConfigError("--tokenizer-path", "needs --model NAME, the engines' name of their model")
        model = ModelConfig(name=args.model, tokenizer=str(args.tokenizer_path), chat_template=args.chat_template)
        others = tuple(other for other in config.models if other.name != model.name)
        config = msgspec.structs.replace(config, models=(*others, model))
    return _with_flags(config, args)


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


def _pods(urls: Sequence[str], sources: Sequence[str], replays: Sequence[str]) -> tuple[PodConfig, ...]:
    urls = [url.rstrip("/") for url in urls]
    endpoints = _by_url(sources, "--kv-event-source", urls)
    replay_endpoints = _by_url(replays, "--kv-event-replay-source", endpoints)
    return tuple(
        PodConfig(
            name=urlsplit(url).netloc,
            url=url,
            kv_events=KvEventsConfig(endpoint=endpoints[url], replay_endpoint=replay_endpoints.get(url))
            if url in endpoints
            else "discover",
        )
        for url in urls
    )


def _by_url(pairs: Sequence[str], flag: str, known: Sequence[str] | dict[str, str]) -> dict[str, str]:
    """`URL=tcp://…` pairs as a mapping; each URL must be in `known`."""
    mapping = {}
    for pair in pairs:
        url, separator, endpoint = pair.partition("=tcp://")
        if not separator:
            raise ConfigError(flag, f"expected URL=tcp://HOST:PORT, got `{pair}`")
        url = url.rstrip("/")
        if url not in known:
            raise ConfigError(flag, f"`{url}` is not among {', '.join(known) or 'the engines given'}")
        mapping[url] = f"tcp://{endpoint}"
    return mapping
