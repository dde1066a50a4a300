"""CPU time of the gateway process per request and per streamed chunk, compared with a bare aiohttp proxy."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median

import aiohttp
import uvloop

from bench.measure import Figure, Scale, cpu_seconds, ratio
from bench.prompts import chat
from matrixinfer.prompt.openai import CHAT_PATH

_CONNECTIONS = 8
_FACTOR = 1.6
"""Target: the gateway costs at most this many times the bare proxy, plus the decision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """The requests of one round."""

    case: str
    bodies: Sequence[bytes]
    requests: int
    concurrency: int
    units: int
    """How many requests, or streamed chunks, the CPU time is divided by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Server:
    url: str
    pid: int


def run(scale: Scale) -> Iterator[Figure]:
    """Per load: CPU time of the bare proxy, of a decision and of the gateway, and the gateway's share of its target."""
    with ExitStack() as stack:
        upstream = _server(stack.enter_context(server_process("upstream")))
        processes = {"bare": stack.enter_context(server_process("bare", upstream.url))}
        for kind in ("deciding", "gateway"):
            processes[kind] = stack.enter_context(server_process(kind, upstream.url, "kv_aware"))
        servers = {name: _server(process) for name, process in processes.items()}
        for load in _loads(scale):
            costs = uvloop.run(_rounds(load, servers, scale.proxy_rounds))
            yield Figure(case=f"{load.case}, bare", name="CPU", value=median(costs["bare"]) * 1e6, unit="µs")
            yield from _compared(load.case, costs["bare"], costs["deciding"], costs["gateway"])


def _compared(
    case: str, bare: Sequence[float], deciding: Sequence[float], gateway: Sequence[float]
) -> Iterator[Figure]:
    decision = [both - forward for both, forward in zip(deciding, bare, strict=True)]
    targets = [_FACTOR * forward + decide for forward, decide in zip(bare, decision, strict=True)]
    yield Figure(case=case, name="CPU", value=median(gateway) * 1e6, unit="µs")
    yield Figure(case=case, name="decision", value=median(decision) * 1e6, unit="µs")
    yield Figure(case=case, name="share of target", value=ratio(gateway, targets), unit="×", target=1.0)


def _loads(scale: Scale) -> list[_Load]:
    def plain(kib: int, requests: int) -> _Load:
        bodies = [chat(kib, session) for session in range(scale.sessions)]
        return _Load(
            case=f"{kib} KiB request", bodies=bodies, requests=requests, concurrency=_CONNECTIONS, units=requests
        )

    bodies = [chat(2, session, stream=True, max_tokens=scale.chunks) for session in range(scale.sessions)]
    chunks = scale.streams * scale.chunks
    return [
        plain(2, scale.requests),
        plain(64, scale.requests // 3),
        _Load(case="streamed chunk", bodies=bodies, requests=scale.streams, concurrency=scale.streams, units=chunks),
    ]


async def _rounds(load: _Load, servers: dict[str, _Server], rounds: int) -> dict[str, list[float]]:
    """CPU seconds per request or chunk in each round. The servers take turns, in alternating order."""
    costs: dict[str, list[float]] = {name: [] for name in servers}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for server in servers.values():
            await _send(session, server.url, load, load.concurrency)
        turns = list(servers.items())
        for _ in range(rounds):
            turns.reverse()
            for name, server in turns:
                before = cpu_seconds(server.pid)
                await _send(session, server.url, load, load.requests)
                costs[name].append((cpu_seconds(server.pid) - before) / load.units)
    return costs


async def _send(session: aiohttp.ClientSession, url: str, load: _Load, requests: int) -> None:
    """Send all requests of the load, `concurrency` at a time. Any failure fails the benchmark."""
    bodies = islice(cycle(load.bodies), requests)

    async def connection() -> None:
        for body in bodies:
            headers = {"content-type": "application/json"}
            async with session.post(url + CHAT_PATH, data=body, headers=headers, raise_for_status=True) as response:
                async for _ in response.content.iter_any():
                    pass

    async with asyncio.TaskGroup() as group:
        for _ in range(load.concurrency):
            group.create_task(connection())


@contextmanager
def server_process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of `bench.servers`, until the context ends."""
    command = [sys.executable, "-m", "bench.servers", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process  # leaving closes its standard input, which ends it


def server_url(process: subprocess.Popen[str]) -> str:
    """The URL of the server in a process, once it is ready."""
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    if not url:
        raise RuntimeError(f"expected the URL of {process.args!r}, but it did not start")
    return url


def _server(process: subprocess.Popen[str]) -> _Server:
    return _Server(url=server_url(process), pid=process.pid)
