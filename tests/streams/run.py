"""Many streams at once over several workers: each is whole, and afterwards memory and descriptors are what they were."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from matrixinfer.tasks import cancel_and_wait
from tests.ports import free_port
from tests.soak.fleet import descriptors, resident_bytes
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
ENGINES = 2
LOOK_SECONDS = 0.5
CONNECT_AT_ONCE = 200
"""Connections that are opened at a time, as the queue of the listening sockets is short."""
MORE_DESCRIPTORS = 32
"""Per worker, beyond those before the first wave, once all have gone."""
MORE_MEMORY, MORE_BYTES = 0.05, 8_000_000
"""Per worker, beyond what the first wave has left: allocators give back what they like."""
MOST_BYTES_PER_STREAM = 100_000


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Each worker's memory and descriptors at one moment."""

    memory: Sequence[int]
    descriptors: Sequence[int]


@dataclass(kw_only=True)
class Wave:
    """Streams that were open at the same time."""

    streams: int
    wrong: list[str] = field(default_factory=list)
    """How streams ended that are not whole."""
    first_seconds: list[float] = field(default_factory=list)
    """Until the first piece, of each stream."""
    most_open: float = 0.0
    """At engines at the same time, as the gateway counts."""
    seconds: float = 0.0
    peak: Sample = field(default_factory=lambda: Sample(memory=(), descriptors=()))
    rest: Sample = field(default_factory=lambda: Sample(memory=(), descriptors=()))


@dataclass(kw_only=True)
class Result:
    """All waves."""

    workers: int
    before: Sample
    waves: list[Wave] = field(default_factory=list)

    def complaints(self) -> Iterator[str]:
        """Why this does not pass."""
        for number, wave in enumerate(self.waves, start=1):
            if wave.wrong:
                yield f"wave {number}: {len(wave.wrong)} streams are not whole, such as: {'; '.join(wave.wrong[:3])}"
            if wave.most_open < wave.streams:
                yield f"wave {number}: {wave.most_open:,.0f} streams were open at a time, expected {wave.streams:,}"
            more = (sum(wave.peak.memory) - sum(self.before.memory)) / wave.streams
            if more > MOST_BYTES_PER_STREAM:
                yield f"wave {number}: a stream takes {more:,.0f} bytes, expected at most {MOST_BYTES_PER_STREAM:,}"
            for worker, (found, first) in enumerate(zip(wave.rest.memory, self.waves[0].rest.memory, strict=True), 1):
                if found > first * (1 + MORE_MEMORY) + MORE_BYTES:
                    yield f"wave {number}: worker {worker} keeps {found - first:,} bytes more than after the first wave"

    def lines(self) -> Iterator[str]:
        """The figures, as a table."""
        yield "wave  streams  open  whole  first piece p50/p99  seconds  per stream  memory before/peak/rest  descriptors"
        for number, wave in enumerate(self.waves, start=1):
            firsts = sorted(wave.first_seconds) or [0.0]
            before, peak, rest = (sum(each.memory) / 1e6 for each in (self.before, wave.peak, wave.rest))
            opened = [sum(each.descriptors) for each in (self.before, wave.peak, wave.rest)]
            yield (
                f"{number:4}  {wave.streams:7,}  {wave.most_open:4.0f}  {wave.streams - len(wave.wrong):5}  "
                f"{firsts[len(firsts) // 2]:8.2f} / {firsts[int(len(firsts) * 0.99)]:4.2f} s  {wave.seconds:6.1f}  "
                f"{(peak - before) * 1e3 / wave.streams:6.1f} KB  "
                f"{before:7.0f} / {peak:.0f} / {rest:.0f} MB  {opened[0]} / {opened[1]} / {opened[2]}"
            )


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes."""

    url: str
    admin: str
    pid: int
    """The supervisor's."""
    session: aiohttp.ClientSession
    pieces: int

    def sample(self) -> Sample:
        pids = [int(each) for each in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
        return Sample(memory=[*map(resident_bytes, pids)], descriptors=[*map(descriptors, pids)])

    async def metric(self, beginning: str) -> float:
        """The sum of the series that begin with this."""
        async with self.session.get(f"{self.admin}/metrics") as response:
            lines = (await response.text()).splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(beginning))


async def run(
    folder: Path,
    *,
    streams: int,
    workers: int,
    waves: int,
    pieces: int,
    pause: float,
    progress: Callable[[str], None] = lambda _: None,
) -> Result:
    """Let waves of so many streams come and go. A stream has so many `pieces`, with a `pause` between them."""
    async with _world(folder, workers, pieces, pause) as world:
        await _wave(world, max(1, streams // 20))  # what is set up once is set up
        result = Result(workers=workers, before=world.sample())
        for number in range(1, waves + 1):
            result.waves.append(await _wave(world, streams))
            progress(f"wave {number} of {waves}: {streams - len(result.waves[-1].wrong):,} of {streams:,} whole")
            result.waves[-1].rest = await _rest(world, result.before)
    return result


async def _wave(world: World, streams: int) -> Wave:
    """Open streams, all at once, and read them to their ends."""
    wave, began, opening = Wave(streams=streams), time.monotonic(), asyncio.Semaphore(CONNECT_AT_ONCE)
    watch = asyncio.create_task(_watch(world, wave))
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=120.0)
    client = aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=2048)
    async with client as session, asyncio.TaskGroup() as group:
        for number in range(streams):
            group.create_task(_stream(world, session, number, wave, opening))
    await cancel_and_wait(watch)
    wave.seconds = time.monotonic() - began
    return wave


async def _stream(
    world: World, session: aiohttp.ClientSession, number: int, wave: Wave, opening: asyncio.Semaphore
) -> None:
    """Read one stream, and put down what is wrong with it."""
    body = {"model": "m", "prompt": f"{number}", "stream": True}
    try:
        async with opening:
            began = time.monotonic()
            response = await session.post(f"{world.url}/v1/completions", json=body)
        async with response:
            events: list[bytes] = []
            async for line in response.content:
                if line.startswith(b"data: "):
                    if not events:
                        wave.first_seconds.append(time.monotonic() - began)
                    events.append(line[6:].strip())
    except (aiohttp.ClientError, TimeoutError) as error:
        wave.wrong.append(f"{type(error).__name__}: {error}")
        return
    expected = [f"{number}.{piece}" for piece in range(world.pieces)]
    if response.status != 200 or events[-1:] != [b"[DONE]"] or [*map(_text, events[:-1])] != expected:
        wave.wrong.append(f"status {response.status}, {len(events)} events, the last is {events[-1:]}")


def _text(event: bytes) -> str:
    return str(json.loads(event)["choices"][0]["text"])


async def _watch(world: World, wave: Wave) -> None:
    """Look at the workers while a wave lasts."""
    while True:
        wave.most_open = max(wave.most_open, await world.metric("matrixinfer_in_flight{"))
        now = world.sample()
        if sum(now.memory) > sum(wave.peak.memory):
            wave.peak = now
        await asyncio.sleep(LOOK_SECONDS)


async def _rest(world: World, before: Sample) -> Sample:
    """The workers once nothing is open any more. Raises `TimeoutError` if some stay."""

    async def all_closed() -> bool:
        now = world.sample().descriptors
        pairs = zip(now, before.descriptors, strict=True)
        return not await world.metric("matrixinfer_in_flight{") and all(
            found <= first + MORE_DESCRIPTORS for found, first in pairs
        )

    await eventually(all_closed, pause=LOOK_SECONDS)
    return world.sample()


@asynccontextmanager
async def _world(folder: Path, workers: int, pieces: int, pause: float) -> AsyncIterator[World]:
    ports, port, admin = [free_port() for _ in range(ENGINES)], free_port(), free_port()
    config: dict[str, Any] = {
        "listen": f"127.0.0.1:{port}",
        "admin": f"127.0.0.1:{admin}",
        "workers": workers,
        "podWatch": {"scrapeIntervalSeconds": 1.0},
        "pods": [
            {"name": f"e{i}", "url": f"http://127.0.0.1:{each}", "kvEvents": "none"} for i, each in enumerate(ports)
        ],
    }
    file = folder / "gateway.json"
    file.write_text(json.dumps(config))
    async with AsyncExitStack() as stack:
        for each in ports:
            stack.enter_context(
                _process("tests.streams.engine", str(each), str(pieces), str(pause), log=folder / "log")
            )
        serve = _process("matrixinfer", "serve", "--config", str(file), log=folder / "gateway.log")
        process = stack.enter_context(serve)
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60.0)))
        url, admin_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin}"
        world = World(url=url, admin=admin_url, pid=process.pid, session=session, pieces=pieces)

        async def is_ready() -> bool:
            assert process.poll() is None, "the gateway has ended: see its log"
            try:
                async with session.get(f"{admin_url}/ready") as response:
                    return response.status == 200
            except aiohttp.ClientError:
                return False

        await eventually(is_ready, pause=0.1)
        yield world


@contextmanager
def _process(*arguments: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
