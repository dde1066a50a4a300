"""CPU time of the gateway's process per request and per streamed chunk, next to a bare aiohttp proxy."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle, islice, product
from statistics import median

import aiohttp
import uvloop

from bench.measure import Figure, Scale, cpu_seconds, ratio
from bench.prompts import chat
from matrixinfer.prompt.openai import CHAT_PATH

_CONNECTIONS = 8
_FACTOR = 1.6
"""The gateway is to cost no more than so many bare proxies, and the decision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """What is sent in one round."""

    case: str
    bodies: Sequence[bytes]
    requests: int
    at_once: int
    per: int
    """Things counted: requests, or chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Server:
    url: str
    pid: int


def run(scale: Scale) -> Iterator[Figure]:
    """Per load: CPU of the bare proxy, of a decision, and of the gateway, as such and as a share of what is aimed at."""
    with ExitStack() as stack:
        upstream = _server(stack.enter_context(_process("upstream")))
        processes = {"bare": stack.enter_context(_process("bare", upstream.url))}
        for kind, policy in product(("deciding", "gateway"), scale.policies):
            processes[f"{kind} {policy}"] = stack.enter_context(_process(kind, upstream.url, policy))
        servers = {name: _server(process) for name, process in processes.items()}
        for load in _loads(scale):
            costs = uvloop.run(_rounds(load, servers, scale.proxy_rounds))
            yield Figure(case=f"{load.case}, bare", name="CPU", value=median(costs["bare"]) * 1e6, unit="µs")
            for policy in scale.policies:
                case = f"{load.case}, {policy}"
                yield from _compared(case, costs["bare"], costs[f"deciding {policy}"], costs[f"gateway {policy}"])


def _compared(
    case: str, bare: Sequence[float], deciding: Sequence[float], gateway: Sequence[float]
) -> Iterator[Figure]:
    decision = [both - forward for both, forward in zip(deciding, bare, strict=True)]
    aimed_at = [_FACTOR * forward + decide for forward, decide in zip(bare, decision, strict=True)]
    yield Figure(case=case, name="CPU", value=median(gateway) * 1e6, unit="µs")
    yield Figure(case=case, name="decision", value=median(decision) * 1e6, unit="µs")
    yield Figure(case=case, name="share of aim", value=ratio(gateway, aimed_at), unit="×", aim=1.0)


def _loads(scale: Scale) -> list[_Load]:
    def plain(kib: int, requests: int) -> _Load:
        bodies = [chat(kib, session) for session in range(scale.sessions)]
        return _Load(case=f"{kib} KiB request", bodies=bodies, requests=requests, at_once=_CONNECTIONS, per=requests)

    bodies = [chat(2, session, stream=True, max_tokens=scale.chunks) for session in range(scale.sessions)]
    chunks = scale.streams * scale.chunks
    return [
        plain(2, scale.requests),
        plain(64, scale.requests // 3),
        _Load(case="streamed chunk", bodies=bodies, requests=scale.streams, at_once=scale.streams, per=chunks),
    ]


async def _rounds(load: _Load, servers: dict[str, _Server], rounds: int) -> dict[str, list[float]]:
    """CPU seconds per request or chunk in each round; the servers take turns, forth and back."""
    costs: dict[str, list[float]] = {name: [] for name in servers}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for server in servers.values():
            await _send(session, server.url, load, load.at_once)
        turns = list(servers.items())
        for _ in range(rounds):
            turns.reverse()
            for name, server in turns:
                before = cpu_seconds(server.pid)
                await _send(session, server.url, load, load.requests)
                costs[name].append((cpu_seconds(server.pid) - before) / load.per)
    return costs


async def _send(session: aiohttp.ClientSession, url: str, load: _Load, requests: int) -> None:
    """All requests of the load, `at_once` under way at any time. Any failure fails the benchmark."""
    bodies = islice(cycle(load.bodies), requests)

    async def connection() -> None:
        for body in bodies:
            headers = {"content-type": "application/json"}
            async with session.post(url + CHAT_PATH, data=body, headers=headers, raise_for_status=True) as response:
                async for _ in response.content.iter_any():
                    pass

    async with asyncio.TaskGroup() as group:
        for _ in range(load.at_once):
            group.create_task(connection())


@contextmanager
def _process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of `bench.servers` until the block ends."""
    command = [sys.executable, "-m", "bench.servers", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process  # leaving closes its standard input, which ends it


def _server(process: subprocess.Popen[str]) -> _Server:
    """The server that a process has become. Waits for it."""
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    if not url:
        raise RuntimeError(f"{process.args!r} did not start")
    return _Server(url=url, pid=process.pid)
