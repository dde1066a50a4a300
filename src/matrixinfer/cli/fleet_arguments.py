"""The options that describe a simulated fleet and its traffic, for the commands that replay."""

from __future__ import annotations

import argparse
from pathlib import Path

from matrixinfer.cli.arguments import (
    at_least_one,
    duration,
    integer,
    packaged_tokenizer,
    seconds_or_zero,
    share,
)
from matrixinfer.errors import ConfigError
from matrixinfer.study import generators, presets
from matrixinfer.study.faults import Fault
from matrixinfer.study.fleet import Fleet
from matrixinfer.study.reading import read
from matrixinfer.study.trace import Trace


def add_traces(parser: argparse.ArgumentParser) -> None:
    """Add the positional TRACE."""
    parser.add_argument(
        "traces",
        nargs="*",
        metavar="TRACE",
        help="JSON lines, also with .gz: the gateway's access log, requests with hash_ids (Mooncake), coding-agent sessions, "
        "or conversations with messages; or a generator, NAME or NAME:KEY=VALUE,…",
    )


def add_fleet(parser: argparse.ArgumentParser) -> None:
    """Add what the fleet is like, and how traces are read."""
    parser.add_argument("--pods", type=at_least_one, default=8, help="number of engines (default: %(default)s)")
    parser.add_argument(
        "--kv-tokens-per-pod", type=at_least_one, metavar="T", help="size of each KV cache (default: the engine's)"
    )
    parser.add_argument(
        "--engine",
        default=presets.DEFAULT,
        metavar="NAME",
        help="engine: a preset, or a YAML file that `matrixinfer calibrate` wrote (default: %(default)s)",
    )
    parser.add_argument(
        "--gateways", type=at_least_one, default=1, metavar="G", help="gateways that share the requests at random"
    )
    parser.add_argument(
        "--gossip", action="store_true", help="let gateways share what they have in flight, as with Redis"
    )
    parser.add_argument(
        "--shared-index", action="store_true", help="let gateways look up in one index, as with `index.kind: redis`"
    )
    parser.add_argument(
        "--rate-scale", type=duration, default=1.0, metavar="X", help="let arrivals come X times as fast"
    )
    parser.add_argument("--seed", type=integer, default=0, metavar="S", help="seed of all draws (default: %(default)s)")
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="KIND@SECONDS[:POD[:VALUE]]",
        help="restart (down for VALUE seconds), reset, join, leave, slow (VALUE times), small (a share VALUE of the cache "
        "from the start), or forget (all gateways restart); may be repeated",
    )
    parser.add_argument(
        "--event-delay",
        type=seconds_or_zero,
        default=0.01,
        metavar="SECONDS",
        help="time from an engine's step until a gateway has applied its events (default: %(default)s)",
    )
    parser.add_argument(
        "--event-loss", type=share, default=0.0, metavar="SHARE", help="share of event batches that are lost"
    )
    parser.add_argument(
        "--block-tokens", type=at_least_one, metavar="N", help="tokens per block (default: the trace's)"
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="tokenizer of conversations (default: that of the extra `demo`)"
    )
    parser.add_argument("--chat-template", metavar="TEMPLATE", default="chatml", help="Jinja file, or `chatml`")


def traces_of(args: argparse.Namespace) -> list[str]:
    """The traces that are named. Raises `ConfigError` if there is none, or if the fleet is not described well."""
    presets.preset(args.engine)
    for fault in args.fault:
        Fault.parse(fault)
    if not args.traces:
        raise ConfigError(
            "TRACE", "expected a file or the name of a generator; `matrixinfer replay --list` prints the generators"
        )
    return list(args.traces)


def trace_of(text: str, args: argparse.Namespace) -> Trace:
    """A trace as named on the command line. Raises `ConfigError` and `TraceError`."""
    if is_generator(text):
        return generators.generate(text, seed=args.seed)
    tokenizer = args.tokenizer or packaged_tokenizer()
    return read(
        Path(text),
        tokenizer=None if tokenizer is None else str(tokenizer),
        chat_template=args.chat_template,
        block_size=args.block_tokens,
        seed=args.seed,
    )


def is_generator(text: str) -> bool:
    """Whether a TRACE is no file."""
    return not Path(text).exists()


def fleet_of(trace: Trace, args: argparse.Namespace) -> Fleet:
    """The fleet for a trace. Raises `ConfigError`."""
    engine = presets.preset(args.engine)
    fleet = Fleet(
        shape=engine.shape(trace.block_size),
        pods=args.pods,
        pod_tokens=args.kv_tokens_per_pod or engine.kv_tokens,
        gateways=args.gateways,
        gossip=args.gossip,
        shared_index=args.shared_index,
        rate_scale=args.rate_scale,
        event_delay=args.event_delay,
        event_loss=args.event_loss,
        faults=[Fault.parse(text) for text in args.fault],
        seed=args.seed,
    )
    if not trace.turns:
        raise ConfigError("TRACE", f"`{trace.name}` has no request with a prompt")
    if fleet.pod_tokens < trace.block_size:
        raise ConfigError("--kv-tokens-per-pod", f"expected at least one block of {trace.block_size} tokens")
    for fault in fleet.faults:
        if fault.kind != "join" and fault.pod >= fleet.pods:
            raise ConfigError("--fault", f"there is no pod {fault.pod}; the pods are 0 to {fleet.pods - 1}")
    return fleet
