"""Which engines a command is about: a config file, or a list of URLs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from matrixinfer.config import Config, KvEventsConfig, ModelConfig, PodConfig, checked, load
from matrixinfer.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that name engines and how their prompts are tokenized."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file; see docs/configuration.md")
    parser.add_argument("--worker-urls", nargs="+", default=[], metavar="URL", help="base URLs of the engines")
    parser.add_argument(
        "--kv-event-source",
        action="append",
        default=[],
        metavar="URL=tcp://…",
        help="where the engine at URL publishes its KV events (default: its own /kv_event_sources says)",
    )
    parser.add_argument(
        "--kv-event-replay-source",
        action="append",
        default=[],
        metavar="URL=tcp://…",
        help="where the engine at URL replays them",
    )
    parser.add_argument("--model", metavar="NAME", help="with --tokenizer-path: the engines' name of their model")
    parser.add_argument("--tokenizer-path", type=Path, metavar="PATH", help="directory or tokenizer.json of that model")
    parser.add_argument("--chat-template", metavar="FILE", help="its chat template, or `chatml`")


def configuration(args: argparse.Namespace) -> Config:
    """The config file, if any, with those flags applied. Raises `ConfigError`."""
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
