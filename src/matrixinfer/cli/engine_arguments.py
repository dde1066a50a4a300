"""The arguments that name engines, by a config file or by their URLs. `serve` and `doctor` share them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from matrixinfer.cli.arguments import CONFIG_HELP, add_engine_key
from matrixinfer.config import Config, KvEventsConfig, ModelConfig, PodConfig, checked, load
from matrixinfer.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name the engines, and the tokenizer of their model."""
    parser.add_argument("--config", type=Path, metavar="FILE", help=CONFIG_HELP)
    parser.add_argument(
        "--worker-urls", nargs="+", default=[], metavar="URL", help="base URLs of the engines, without `/v1`"
    )
    parser.add_argument(
        "--kv-event-source",
        action="append",
        default=[],
        metavar="URL=tcp://…",
        help="where the engine at URL publishes its KV events; may be repeated (default: as its /kv_event_sources says)",
    )
    parser.add_argument(
        "--kv-event-replay-source",
        action="append",
        default=[],
        metavar="URL=tcp://…",
        help="where the engine at URL replays past KV events; may be repeated",
    )
    add_engine_key(parser)
    parser.add_argument(
        "--model", metavar="NAME", help="the name under which the engines serve their model; needs --tokenizer-path"
    )
    parser.add_argument(
        "--tokenizer-path", type=Path, metavar="PATH", help="directory or tokenizer.json of the model; needs --model"
    )
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="Jinja file with the model's chat template, or `chatml`; needs --tokenizer-path",
    )


def configuration(args: argparse.Namespace) -> Config:
    """The config file, if any, with these arguments applied. Raises `ConfigError`."""
    config = load(args.config) if args.config else Config()
    if args.worker_urls:
        if config.pods:
            raise ConfigError("--worker-urls", "the config file already names pods: use one or the other")
        pods = _pods(args.worker_urls, args.kv_event_source, args.kv_event_replay_source)
        config = msgspec.structs.replace(config, pods=pods)
    elif args.kv_event_source or args.kv_event_replay_source:
        raise ConfigError("--kv-event-source", "needs --worker-urls; in a config file, set `kvEvents` of the pod")
    if not (config.pods or config.discovery.sources or config.discovery.start_empty):
        raise ConfigError("$.pods", "no engines: name them in a file (--config FILE) or by URL (--worker-urls URL …)")
    if args.model or args.tokenizer_path or args.chat_template:
        if not (args.model and args.tokenizer_path):
            raise ConfigError(
                "--tokenizer-path",
                "expected --model NAME and --tokenizer-path PATH together; --chat-template needs both",
            )
        model = ModelConfig(name=args.model, tokenizer=str(args.tokenizer_path), chat_template=args.chat_template)
        others = tuple(other for other in config.models if other.name != model.name)
        config = msgspec.structs.replace(config, models=(*others, model))
    if args.engine_api_key_file or args.engine_api_key_env:
        file = args.engine_api_key_file
        keys = msgspec.structs.replace(
            config.engine_keys,
            api_key_file=None if file is None else str(file.resolve()),
            api_key_env=args.engine_api_key_env,
        )
        config = msgspec.structs.replace(config, engine_keys=keys)
    return checked(config)


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
    """Parse `URL=tcp://…` pairs. Every URL must be in `known`."""
    mapping = {}
    for pair in pairs:
        url, separator, endpoint = pair.partition("=tcp://")
        if not separator:
            raise ConfigError(flag, f"expected URL=tcp://HOST:PORT, got `{pair}`")
        url = url.rstrip("/")
        if url not in known:
            raise ConfigError(flag, f"expected one of {', '.join(known) or 'the engines that are given'}, got `{url}`")
        mapping[url] = f"tcp://{endpoint}"
    return mapping
