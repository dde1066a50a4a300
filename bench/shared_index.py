"""The shared index, with a real server: lookups by script and by pipeline, an agent's writes, memory."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import uvloop

from bench.fleet import fill
from bench.lookup import hold_queries, queries
from bench.measure import Figure, Scale, cpu_seconds, ratio
from bench.prompts import MODEL
from bench.valkey import Loader, Valkey, valkey
from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config import RedisConfig
from matrixinfer.index.redis import layout
from matrixinfer.index.redis.index import scheme_of
from matrixinfer.index.redis.reader import BlockReader
from matrixinfer.index.redis.store import Store
from matrixinfer.index.redis.writer import BlockWriter

_PODS = [f"qwen-{i}.default" for i in range(64)]
_LENGTHS = (16, 128)
_TARGET_MS, _TARGET_RATIO = 0.5, 1 / 3
_IN_FLIGHT = 32
_WRITERS, _FRAME_BLOCKS = 8, 32
_FRAMES_PER_SECOND = 50.0
_DAY = 86_400.0
_HOLDERS = (1, 2, 8, 64)
_WAYS = {"script": (True, True), "script, every block": (True, False), "pipeline": (False, False)}
"""Kinds of lookups: whether they run scripts, and whether these may search."""


@dataclass(slots=True)
class _Rounds:
    """The measurements of one kind of lookup, by round."""

    mean: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    client: list[float] = field(default_factory=list)
    server: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)


def run(scale: Scale) -> Iterator[Figure | str]:
    """Memory per entry, then lookups among many keys, then an agent's writes."""
    with valkey() as server, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        yield from _memory(server, scale)
        prompts = queries(max(4, min(128, scale.redis_keys // 1000)))
        yield from _load(server, prompts, scale)
        yield from _lookups(server, runner, prompts, scale)
        yield from _writes(server, runner, scale)


def _memory(server: Valkey, scale: Scale) -> Iterator[Figure]:
    """Growth of the server's memory with each further pod that has the same blocks."""
    draw = random.Random(6)
    blocks = [draw.getrandbits(63) for _ in range(scale.redis_keys // 40)]
    before = server.used_bytes()
    for pods in _HOLDERS:
        loader = Loader(server)
        for pod in _PODS[:pods]:
            for start in range(0, len(blocks), 500):
                loader.add(MODEL, pod, blocks[start : start + 500], None)
        loader.flush()
        used = (server.used_bytes() - before) / len(blocks)
        case = f"memory, {pods} {'pod' if pods == 1 else 'pods'} a block"
        yield Figure(case=case, name="per block", value=used, unit="B")
        yield Figure(case=case, name="per pod of a block", value=used / pods, unit="B")
    server.client.flushall()


def _load(server: Valkey, prompts: Sequence[Sequence[int]], scale: Scale) -> Iterator[Figure | str]:
    """Add keys up to the requested number. All pods have an epoch and a live writer."""
    start, now = time.perf_counter(), int(time.time())
    loader = Loader(server)
    hold_queries(loader, _PODS, prompts)
    step = max(1, scale.redis_keys // 50)
    for number in range(50):
        fill(loader, _PODS, step, seed=100 + number)  # other blocks than those of the prompts
        yield f"{server.client.dbsize():,} keys loaded"
    loader.flush()
    server.client.hset(layout.EPOCHS, mapping=dict.fromkeys(_PODS, now - 3600))
    server.client.hset(layout.LEASES, mapping=dict.fromkeys(_PODS, now + 36000))
    rate = loader.blocks / (time.perf_counter() - start)
    yield Figure(case="loading", name="keys", value=server.client.dbsize() / 1e6, unit="M")
    yield Figure(case="loading", name="rate", value=rate / 1e6, unit="M entries/s")


def _lookups(
    server: Valkey, runner: asyncio.Runner, prompts: Sequence[Sequence[int]], scale: Scale
) -> Iterator[Figure]:
    for length in _LENGTHS:
        chains = [prompt[:length] for prompt in prompts]
        rounds = runner.run(_alternate(server, chains, scale))
        for way, took in rounds.items():
            case, target = f"{length} blocks, {way}", _TARGET_MS if way == "script" else None
            yield Figure(case=case, name="p50", value=min(took.p50) * 1e3, unit="ms", target=target)
            yield Figure(case=case, name="p99", value=median(took.p99) * 1e3, unit="ms")
            yield Figure(case=case, name="client CPU", value=min(took.client) * 1e6, unit="µs")
            yield Figure(case=case, name="server CPU", value=min(took.server) * 1e6, unit="µs")
            name = f"{_IN_FLIGHT} in flight"
            yield Figure(case=case, name=name, value=max(took.rate) / 1e3, unit="k/s")
        share = ratio(rounds["script"].mean, rounds["pipeline"].mean)
        yield Figure(
            case=f"{length} blocks, script", name="relative to pipeline", value=share, unit="×", target=_TARGET_RATIO
        )


async def _alternate(server: Valkey, chains: Sequence[Sequence[int]], scale: Scale) -> dict[str, _Rounds]:
    rounds = {way: _Rounds() for way in _WAYS}
    count = max(len(chains), scale.redis_lookups)
    for turn in range(scale.rounds + 1):
        for way, (scripts, prefix_closed) in _WAYS.items():
            config = RedisConfig(host="127.0.0.1", port=server.port, scripts=scripts, deadline_seconds=60)
            async with Store(config) as store:
                reader = BlockReader(store, max_age=_DAY, prefix_closed=prefix_closed)
                _check(await reader.match(MODEL, chains[0]), len(chains[0]))
                kept = rounds[way] if turn else _Rounds()  # the first round warms the caches
                asked = count if scripts else count // 2  # a pipeline takes ten times as long
                await _one_by_one(server, reader.match, itertools.islice(itertools.cycle(chains), asked), kept)
                await _concurrently(reader.match, itertools.islice(itertools.cycle(chains), asked), kept)
    return rounds


def _check(found: dict[str, int], length: int) -> None:
    """Fail when the result is wrong: a figure for it would mean nothing."""
    held = sorted(found.values())
    assert held == sorted(min(length, count) for count in [15] * 53 + [40] * 8 + [100, 100, 128])


_Match = Callable[[str, Sequence[int]], Awaitable[dict[str, int]]]


async def _one_by_one(server: Valkey, match: _Match, prompts: Iterator[Sequence[int]], kept: _Rounds) -> None:
    times = []
    server_cpu, client_cpu = cpu_seconds(server.pid), time.process_time()
    for prompt in prompts:
        start = time.perf_counter()
        await match(MODEL, prompt)
        times.append(time.perf_counter() - start)
    kept.client.append((time.process_time() - client_cpu) / len(times))
    kept.server.append((cpu_seconds(server.pid) - server_cpu) / len(times))
    kept.mean.append(sum(times) / len(times))
    kept.p50.append(median(times))
    kept.p99.append(_p99(times))


async def _concurrently(match: _Match, prompts: Iterator[Sequence[int]], kept: _Rounds) -> None:
    done = 0

    async def work() -> None:
        nonlocal done
        for prompt in prompts:
            await match(MODEL, prompt)
            done += 1

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(_IN_FLIGHT):
            group.create_task(work())
    kept.rate.append(done / (time.perf_counter() - start))


def _writes(server: Valkey, runner: asyncio.Runner, scale: Scale) -> Iterator[Figure]:
    rounds = [runner.run(_ingest(server, scale.redis_writes, seed)) for seed in range(scale.feed_rounds)]
    for name in ("added", "removed"):
        rate, client, used = (best(each[name][i] for each in rounds) for i, best in enumerate((max, min, min)))
        yield Figure(case=f"agent, blocks {name}", name="rate", value=rate / 1e3, unit="k blocks/s")
        yield Figure(case=f"agent, blocks {name}", name="client CPU", value=client * 1e6, unit="µs")
        yield Figure(case=f"agent, blocks {name}", name="server CPU", value=used * 1e6, unit="µs")
    lags = runner.run(_lag(server, scale.redis_lags))
    yield Figure(case="agent, until visible", name="p50", value=median(lags) * 1e3, unit="ms")
    yield Figure(case="agent, until visible", name="p99", value=_p99(lags) * 1e3, unit="ms")


async def _ingest(server: Valkey, blocks: int, seed: int) -> dict[str, tuple[float, float, float]]:
    """Write frames at full speed. Returns blocks per second, and CPU seconds per block of client and server."""
    draw = random.Random(seed)
    frames = [[draw.getrandbits(63) for _ in range(_FRAME_BLOCKS)] for _ in range(blocks // _FRAME_BLOCKS)]
    took = {}
    async with _store(server) as store, _writer(store) as writer:
        for name, change in (("added", writer.add), ("removed", writer.remove)):
            start, client, used = time.perf_counter(), time.process_time(), cpu_seconds(server.pid)
            for number, frame in enumerate(frames):
                change(MODEL, f"new-{number % _WRITERS}", frame)
                if number % _WRITERS == 0:
                    await asyncio.sleep(0)
            await writer.flush()
            seconds = time.perf_counter() - start
            client, used = time.process_time() - client, cpu_seconds(server.pid) - used
            count = len(frames) * _FRAME_BLOCKS
            took[name] = (count / seconds, client / count, used / count)
        assert writer.stats.blocks >= 2 * len(frames) * _FRAME_BLOCKS
    return took


async def _lag(server: Valkey, frames: int) -> list[float]:
    """Seconds until a change is visible to other clients, at a steady rate."""
    draw, lags = random.Random(9), []
    async with _store(server) as store, _store(server) as others, _writer(store) as writer:
        client: Any = others.client
        for number in range(_WRITERS):
            writer.follow(f"lag-{number}")
        await writer.flush()
        for number in range(frames):
            began = time.perf_counter()
            pod, frame = f"lag-{number % _WRITERS}", [draw.getrandbits(63) for _ in range(_FRAME_BLOCKS)]
            writer.add(MODEL, pod, frame)
            while not await client.hexists(f"{layout.prefix_of(MODEL)}{frame[-1]}", pod):
                pass
            lags.append(time.perf_counter() - began)
            await asyncio.sleep(max(0.0, began + 1 / _FRAMES_PER_SECOND - time.perf_counter()))
    return lags


def _store(server: Valkey) -> Store:
    return Store(RedisConfig(host="127.0.0.1", port=server.port))


def _writer(store: Store) -> BlockWriter:
    return BlockWriter(store, meta=scheme_of(TokenBlockProcessor()), max_age=_DAY)


def _p99(times: Sequence[float]) -> float:
    return quantiles(times, n=100, method="inclusive")[98]
