"""Gateways and agents as processes around one Redis, before simulated engines; and what is truly in the engines' caches."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config import RedisConfig
from matrixinfer.errors import IndexUnavailable
from matrixinfer.index.base import IndexStats
from matrixinfer.index.redis import scan
from matrixinfer.index.redis.store import Store
from matrixinfer.kvevents.subscriber import FeedSource, Subscriber
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.model import Timing
from matrixinfer.sim.server import SimEngine
from tests.servers import Server
from tests.waiting import DEADLINE_SECONDS, eventually

from .fleet import TOKENIZER

BLOCK = 128
LEASE_SECONDS = 2.0
MAX_AGE = 86_400.0
COMPLETIONS = "/v1/completions"
Held = dict[str, set[tuple[str, int]]]
"""Pod to model and block."""


class Truth:
    """A `BlockIndex` that is a set per pod."""

    prefix_closed = False

    def __init__(self) -> None:
        self.held: Held = {}

    def add(self, model: str, pod: str, hashes: Sequence[int], parent: int | None) -> None:
        self.held.setdefault(pod, set()).update((model, block) for block in hashes)

    def remove(self, model: str, pod: str, hashes: Iterable[int]) -> None:
        self.held.get(pod, set()).difference_update((model, block) for block in hashes)

    def clear(self, pod: str) -> None:
        self.held.pop(pod, None)

    forget = clear

    async def match(self, model: str, hashes: Sequence[int]) -> Mapping[str, int]:
        return {}

    async def last(self, model: str, pods: Collection[str], hashes: Sequence[int]) -> Mapping[str, int]:
        return {}

    async def flush(self) -> None: ...

    def stats(self) -> IndexStats:
        return IndexStats(blocks=0, pods=0, evicted=0, memory_bytes=0)


@dataclass(kw_only=True)
class Process:
    """One command; its log goes to a file."""

    arguments: Sequence[str]
    log: Path
    process: asyncio.subprocess.Process | None = None

    async def start(self, event: str) -> dict[str, Any]:
        """Start it, and wait for a line of its log: its addresses."""
        self.log.write_bytes(b"")
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "matrixinfer", *self.arguments, stdout=log, stderr=log
            )
        async with asyncio.timeout(DEADLINE_SECONDS):
            while True:
                for line in self.log.read_text().splitlines():
                    with suppress(json.JSONDecodeError):
                        if (row := json.loads(line)).get("event") == event:
                            return dict(row)
                assert self.process.returncode is None, self.log.read_text()[-2000:]
                await asyncio.sleep(0.05)

    def send(self, what: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(what)

    async def end(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        if self.process is not None:
            await self.process.wait()


class Wire:
    """Between the processes and Redis: passes bytes on, late or not at all."""

    def __init__(self, target: int) -> None:
        self.delay = 0.0
        """Seconds that replies are held back."""
        self.resets_after: int | None = None
        """Connections are reset after so many more bytes of replies."""
        self.port = 0
        self._target = target
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Wire]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in list(self._tasks):
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        ends = [writer]
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            ends.append(back)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(reader, back))
                group.create_task(self._replies(there, writer))
        except (OSError, ExceptionGroup):
            pass  # both ends go below
        finally:
            for end in ends:
                end.transport.abort()
                with suppress(OSError):
                    await end.wait_closed()
            self._tasks.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError

    async def _replies(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            if self.delay:
                await asyncio.sleep(self.delay)
            if self.resets_after is not None:
                writer.write(data[: self.resets_after])
                raise ConnectionResetError
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError


@dataclass
class Load:
    """What became of requests that are sent one after the other by several clients."""

    sent: int = 0
    answered: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def p99(self) -> float:
        """Of their latencies, in milliseconds."""
        ordered = sorted(self.seconds)
        return 1000 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


@dataclass(kw_only=True)
class World:
    """All of it."""

    server: Server
    wire: Wire
    engines: Sequence[SimEngine]
    agents: list[Process]
    gateways: list[Process]
    urls: list[str]
    admins: list[str]
    truth: Truth
    session: aiohttp.ClientSession
    prompts: int = 24

    def prompt(self, number: int) -> list[int]:
        """Prompts share beginnings, eight each."""
        group = number // 8
        return [1000 + group] * 512 + [2000 + number] * 700

    async def ask(self, number: int, *, gateway: int = 0) -> None:
        """One request; where a gateway is gone, at the next one, as clients do behind a balancer."""
        body = {"model": "sim", "prompt": self.prompt(number % self.prompts), "max_tokens": 2}
        for attempt in range(len(self.urls)):
            url = self.urls[(gateway + attempt) % len(self.urls)]
            try:
                async with self.session.post(url + COMPLETIONS, json=body) as response:
                    await response.read()
                    assert response.status == 200
                    return
            except aiohttp.ClientError:
                continue
        raise AssertionError("no gateway answered")

    async def load(self, load: Load, until: asyncio.Event, *, clients: int = 4) -> None:
        """Send requests until the event is set."""

        async def client(number: int) -> None:
            while not until.is_set():
                load.sent += 1
                began = time.monotonic()
                await self.ask(load.sent, gateway=number % len(self.urls))
                load.seconds.append(time.monotonic() - began)
                load.answered += 1
                await asyncio.sleep(0.02)

        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(client(number))

    async def wrong(self) -> int:
        """Entries in Redis that count and should not, or that should and do not."""
        found: Held = {}
        async with Store(RedisConfig(host="127.0.0.1", port=self.server.port)) as store:
            floors = await scan.floors(store, max_age=MAX_AGE)
            async for page in scan.pages(store):
                for block in page:
                    for pod, at in block.stamps.items():
                        if floors.counts(pod, at):
                            found.setdefault(pod, set()).add((block.model, block.hash))
        return sum(
            len(found.get(pod, set()) ^ self.truth.held.get(pod, set()))
            for pod in found.keys() | self.truth.held.keys()
        )

    async def is_exact(self) -> bool:
        """Whether gateways decide by an index that is right."""
        try:
            if await self.wrong():
                return False
        except IndexUnavailable:
            return False
        for admin in self.admins:
            body = {"model": "sim", "prompt": self.prompt(0), "max_tokens": 2}
            try:
                async with self.session.post(
                    f"{admin}/debug/route", params={"path": COMPLETIONS}, json=body
                ) as response:
                    decision = await response.json()
            except aiohttp.ClientError:
                return False
            if decision["notes"] or any(pod["trust"] != "exact" for pod in decision["pods"].values()):
                return False
        return True

    async def heals(self) -> float:
        """Seconds until everything is exact again. Raises `TimeoutError`."""
        return await elapsed(self.is_exact)


async def elapsed(condition: Callable[[], Awaitable[bool]]) -> float:
    """How long it takes until something holds. Raises `TimeoutError`."""
    began = time.monotonic()
    await eventually(condition, pause=0.1)
    return time.monotonic() - began


@asynccontextmanager
async def world(
    folder: Path, tokenizer: LocalTokenizer, server: Server, *, gateways: int = 1, agents: int = 1
) -> AsyncIterator[World]:
    """A Redis, two engines, and processes around it."""
    async with AsyncExitStack() as stack:
        timing = Timing(step=0.001, prefill_token=0.00001)
        settings = SimEngineConfig(num_blocks=1_000, timing=timing)
        engines = [await stack.enter_async_context(SimEngine(settings, tokenizer)) for _ in range(2)]
        wire = await stack.enter_async_context(Wire(server.port).open())
        truth = Truth()
        subscriber = await stack.enter_async_context(Subscriber(index=truth, blocks=TokenBlockProcessor(BLOCK)))
        for number, engine in enumerate(engines):
            publisher = engine.ranks[0].publisher
            subscriber.follow(
                FeedSource(
                    pod=f"pod-{number}.test",
                    model="sim",
                    endpoint=publisher.endpoint,
                    replay_endpoint=publisher.replay_endpoint,
                )
            )
        config = {
            "listen": "127.0.0.1:0",
            "admin": "127.0.0.1:0",
            "models": [{"name": "sim", "tokenizer": str(TOKENIZER), "chatTemplate": "chatml"}],
            "pods": [{"name": f"pod-{n}.test", "url": engine.url} for n, engine in enumerate(engines)],
            "index": {"kind": "redis", "leaseSeconds": LEASE_SECONDS},
            "redis": {"host": "127.0.0.1", "port": wire.port, "shareLoad": False},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        arguments = ("--config", str(folder / "config.yaml"))
        made = World(
            server=server,
            wire=wire,
            engines=engines,
            agents=[
                Process(arguments=("agent", *arguments, "--listen", "none"), log=folder / f"agent-{n}.log")
                for n in range(agents)
            ],
            gateways=[
                Process(arguments=("serve", *arguments), log=folder / f"gateway-{n}.log") for n in range(gateways)
            ],
            urls=[],
            admins=[],
            truth=truth,
            session=await stack.enter_async_context(aiohttp.ClientSession()),
        )
        for process in (*made.agents, *made.gateways):
            stack.push_async_callback(process.end)
        for agent in made.agents:
            await agent.start("agent_started")
        for process in made.gateways:
            line = await process.start("gateway_started")
            made.urls.append(line["listen"])
            made.admins.append(line["admin"])
        await made.heals()
        yield made
