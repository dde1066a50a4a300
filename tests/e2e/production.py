"""Settings of a gateway with everything on: TLS, workers, keys, limits, salts, a queue, routes and a log."""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matrixinfer.access.key_file import hash_of
from tests.tls import Files, authority, client_context

WORKERS = 2
TENANTS = ("large", "small")
KEYS = [f"sk-{each}" for each in TENANTS]
FEW, FEW_KEY = 40, "sk-few"
"""A key that may send so many requests."""
ALIAS = "alias"
"""What clients may call the model `m`."""


@dataclass(frozen=True, kw_only=True)
class Production:
    """The settings, and what clients need."""

    config: Mapping[str, Any]
    context: ssl.SSLContext
    keys: Sequence[str]


def production(folder: Path, *, redis: int, places: int, concurrent: int) -> Production:
    """For a gateway that is configured by a file in `folder`, with a Redis at that port.

    So many requests may be at engines at a time, and so many of each key at the gateway.
    """
    ca, ca_file = authority(folder, "ca")
    Files(folder, "server").write(ca.issue_cert("127.0.0.1"))
    keys: list[dict[str, Any]] = [
        {"name": f"key-{each}", "tenant": each, "hash": hash_of(f"sk-{each}")} for each in TENANTS
    ]
    few = {"windowSeconds": 600, "requests": FEW}
    keys.append({"name": "few", "tenant": "small", "hash": hash_of(FEW_KEY), "limits": few})
    (folder / "keys.yaml").write_text(json.dumps({"keys": keys}))
    (folder / "isolation.secret").write_text("s" * 40)
    config = {
        "workers": WORKERS,
        "tls": {"certFile": "server.pem", "keyFile": "server.key"},
        "redis": {"port": redis},
        "access": {
            "keysFile": "keys.yaml",
            "countIn": "redis",
            "isolation": {"secretFile": "isolation.secret"},
            "tenants": [{"name": "large", "weight": 3}, {"name": "small"}],
            "limits": {
                "windowSeconds": 600,
                "requests": 10**6,
                "concurrentRequests": concurrent,
                "inputTokens": 10**9,
                "outputTokens": 10**9,
                "uncachedTokens": 10**9,
            },
        },
        "admission": {"maxConcurrentRequests": places, "queueSize": 400},
        "accessLog": {"path": "access.jsonl"},
        "routes": [{"name": "front", "models": [ALIAS], "targets": [{"model": "m"}]}],
        "api": {"sseKeepAliveSeconds": 0.1},
    }
    return Production(config=config, context=client_context(ca_file), keys=KEYS)


def written(folder: Path) -> list[dict[str, Any]]:
    """The lines of the access logs of all workers."""
    files = (folder / f"access-{worker}.jsonl" for worker in range(1, WORKERS + 1))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]
