"""The routers that are compared here, and how each follows the engines' KV events where it can."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec
from tests.vllm.engine import NAME, Engine
from tests.vllm.model import tokenizer_of

from bench.peers.routers import OURS, PEERS, Peer

BLOCK = 32
Command = Callable[[Path, int, Sequence[str]], list[str]]


def commands(engines: Sequence[Engine], policies: Sequence[str] = ("round_robin",)) -> Mapping[str, Command]:
    """How each router is started in front of these engines. Names say the router and its policy.

    `policies` are ours besides the default.
    """
    peers = {peer.package: peer for peer in PEERS}
    vllm = peers["vllm-router"]
    return MappingProxyType(
        {
            OURS: _ours(engines, "kv_aware"),
            **{f"{OURS} {policy}": _ours(engines, policy) for policy in policies},
            "sglang-router cache_aware": peers["sglang-router"].arguments,
            "smg cache_aware": peers["smg"].arguments,
            "vllm-router cache_aware": vllm.arguments,
            "vllm-router kv_aware": _following(vllm, engines),
        }
    )


def _ours(engines: Sequence[Engine], policy: str) -> Command:
    def command(folder: Path, port: int, urls: Sequence[str]) -> list[str]:
        config = {
            "listen": f"127.0.0.1:{port}",
            "admin": None,
            "models": [{"name": NAME, "tokenizer": str(tokenizer_of(engines[0].model))}],
            "pods": [
                {
                    "name": f"engine-{number}",
                    "url": url,
                    "kvEvents": {"endpoint": engine.events, "replayEndpoint": engine.replays_of(0)},
                }
                for number, (url, engine) in enumerate(zip(urls, engines, strict=True))
            ],
            "log": {"level": "warning"},
        }
        file = folder / f"{policy}-{port}.yaml"
        file.write_bytes(msgspec.yaml.encode(config))
        return [sys.executable, "-m", "matrixinfer", "serve", "--config", str(file), "--policy", policy]

    return command


def _following(peer: Peer, engines: Sequence[Engine]) -> Command:
    """vllm-router with its policy for KV events."""

    def command(folder: Path, port: int, urls: Sequence[str]) -> list[str]:
        arguments = peer.arguments(folder, port, urls)
        arguments[arguments.index("cache_aware")] = "kv_aware"
        for url, engine in zip(urls, engines, strict=True):
            arguments += ["--kv-event-source", f"{url}={engine.events}"]
            arguments += ["--kv-event-replay-source", f"{url}={engine.replays_of(0)}"]
        return [*arguments, "--kv-event-block-size", str(BLOCK), "--kv-event-model", NAME]

    return command
