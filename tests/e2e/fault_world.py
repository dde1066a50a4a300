"""A gateway and engines that can be told to fail, as processes, and clients that put down how each request ended."""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp

from matrixinfer.tasks import cancel_and_wait
from tests.ports import free_port
from tests.waiting import DEADLINE_SECONDS, eventually

ROOT = Path(__file__).parents[2]
SETTLE_SECONDS = 2.0
"""After this long new requests must not fail any more."""
CONFIG = """
listen: 127.0.0.1:{port}
admin: 127.0.0.1:{admin}
podWatch: {{scrapeIntervalSeconds: 0.25, scrapeTimeoutSeconds: 0.5}}
outliers: {{ejectSeconds: {eject}, maxEjectSeconds: {longest}}}
drain: {{delaySeconds: {delay}}}
pods:
{pods}
{more}
"""


@dataclass(frozen=True, kw_only=True)
class Front:
    """How clients reach the gateway, and what its configuration has besides."""

    more: str = ""
    context: ssl.SSLContext | None = None
    """With one, the gateway speaks TLS."""
    keys: Sequence[str] = ()
    """API keys, which requests use in turn."""
    model: str = "m"
    """The name that clients ask for."""
    workers: int = 1


PLAIN = Front()


@dataclass
class Load:
    """Requests, and how they ended. Each is in exactly one of the lists."""

    answered: list[tuple[float, float]] = field(default_factory=list)
    """Start and seconds of each."""
    failed: list[tuple[float, str]] = field(default_factory=list)
    """Start and kind of each that the client can see to have failed."""
    broken: list[str] = field(default_factory=list)
    """Answers that look whole, and are not."""
    sent: int = 0

    def share_from(self, start: float) -> float:
        """Share of answered requests among those that were sent from `start` on."""
        good = sum(at >= start for at, _ in self.answered)
        bad = sum(at >= start for at, _ in self.failed)
        return good / (good + bad) if good + bad else 1.0


@dataclass
class World:
    """The processes."""

    ports: list[int]
    ranks: int
    gateway: str
    admin: str
    session: aiohttp.ClientSession
    process: subprocess.Popen[bytes]
    """The gateway's."""
    front: Front = PLAIN
    engines: list[subprocess.Popen[bytes]] = field(default_factory=list)
    numbers: count[int] = field(default_factory=count)

    def start(self, number: int) -> None:
        arguments = [str(self.ports[number]), str(self.ranks)]
        command = [sys.executable, "-m", "tests.e2e.faulty_engine", *arguments]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.engines[number : number + 1] = [process]

    async def inflict(self, fault: str, number: int = 0) -> None:
        """An engine fails from now on; with several ranks only the first of them, if the fault is an answer."""
        engine = self.engines[number]
        if fault == "freeze":
            engine.send_signal(signal.SIGSTOP)
        elif fault in ("kill", "restart"):
            engine.kill()
            engine.wait()
            if fault == "restart":
                self.start(number)
        else:
            await self.set_mode(f"{fault}?rank=0" if self.ranks > 1 else fault, number)

    async def heal(self, fault: str, number: int = 0) -> None:
        """It is well again."""
        if fault == "freeze":
            self.engines[number].send_signal(signal.SIGCONT)
        elif fault == "kill":
            self.start(number)
        await eventually(lambda: self.is_up(number), pause=0.05)
        await self.set_mode("ok", number)

    async def set_mode(self, mode: str, number: int) -> None:
        async with self.session.put(f"http://127.0.0.1:{self.ports[number]}/fault/{mode}") as response:
            assert response.status == 200

    async def is_up(self, number: int) -> bool:
        try:
            async with self.session.get(f"http://127.0.0.1:{self.ports[number]}/health") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False

    async def pods(self) -> list[dict[str, Any]]:
        """What each worker of the gateway knows of its pods."""
        pods: list[dict[str, Any]] = []
        for worker in range(1, self.front.workers + 1):
            query = {} if self.front.workers == 1 else {"worker": str(worker)}
            async with self.session.get(f"{self.admin}/debug/pods", params=query) as response:
                pods += (await response.json())["pods"]
        return pods

    async def is_whole(self) -> bool:
        """Whether every endpoint is healthy and gets requests; sends one, which may be a probe."""
        await self.ask(Load(), stream=False)
        pods = await self.pods()
        return all(pod["healthy"] and not pod["withheld"] and pod["ranks"] == self.ranks for pod in pods)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[dict[str, float]]:
        """Endpoints that the gateway leaves out, and when it first did, while the context is open."""
        found: dict[str, float] = {}

        async def watch() -> None:
            while True:
                for pod in await self.pods():
                    for name in (*pod["withheld"], *(() if pod["healthy"] else (pod["name"],))):
                        found.setdefault(name, time.monotonic())
                await asyncio.sleep(0.02)

        task = asyncio.create_task(watch())
        try:
            yield found
        finally:
            await cancel_and_wait(task)

    async def ejections(self) -> float:
        """How often the gateway has ejected an endpoint."""
        return await self.metric("matrixinfer_ejections_total{")

    async def metric(self, beginning: str) -> float:
        """The sum of the series that begin with this."""
        async with self.session.get(f"{self.admin}/metrics") as response:
            lines = (await response.text()).splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(beginning))

    def connection(self) -> aiohttp.ClientSession:
        """A client with one connection to the gateway."""
        connector = aiohttp.TCPConnector(limit=1, ssl=self.front.context or True)
        return aiohttp.ClientSession(connector=connector, timeout=self.session.timeout)

    async def ask(
        self,
        load: Load,
        *,
        stream: bool,
        prompt: str = "prompt",
        key: str | None = None,
        session: aiohttp.ClientSession | None = None,
    ) -> None:
        number, keys = next(self.numbers), self.front.keys
        body = {"model": self.front.model, "prompt": f"{prompt} {number}", "stream": stream}
        key = keys[number % len(keys)] if key is None and keys else key
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        load.sent += 1
        start = time.monotonic()
        try:
            url = f"{self.gateway}/v1/completions"
            async with (session or self.session).post(url, data=json.dumps(body), headers=headers) as response:
                answer = await response.read()
                if response.status != 200:
                    load.failed.append((start, str(response.status)))
                elif answer.endswith(b"data: [DONE]\n\n" if stream else b"}"):
                    load.answered.append((start, time.monotonic() - start))
                else:
                    load.broken.append(repr(answer[-40:]))
        except (aiohttp.ClientError, ConnectionError) as error:
            load.failed.append((start, type(error).__name__))

    @asynccontextmanager
    async def loaded(self, clients: int, *, stream: bool | None) -> AsyncIterator[Load]:
        """Clients that ask without a pause while the context is open; every second one streams if `stream` is None."""
        load, over = Load(), asyncio.Event()

        async def client(number: int) -> None:
            while not over.is_set():
                await self.ask(load, stream=number % 2 == 0 if stream is None else stream)

        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(client(number))
            try:
                yield load
            finally:
                over.set()


@dataclass(frozen=True, kw_only=True)
class Struck:
    """What faults have cost. Times are in seconds."""

    load: Load
    left_out: Mapping[str, float]
    """Endpoints that got no requests while the faults lasted, and when after their beginning."""
    share: float
    """Of requests that were sent when new ones must not fail any more, and were answered."""
    recovered: float
    """Until all endpoints got requests again, after the faults had ended."""


async def strike(
    world: World, faults: Sequence[str], *, clients: int, stream: bool | None, measured: float = 1.0
) -> Struck:
    """Engines fail, the first with the first fault and so on, under load. No request may be lost."""
    async with world.watching() as left_out, world.loaded(clients, stream=stream) as load:
        await eventually(lambda: len(load.answered) > 2 * clients)
        left_out.clear()
        began = time.monotonic()
        for number, fault in enumerate(faults):
            await world.inflict(fault, number)
        await asyncio.sleep(SETTLE_SECONDS + measured)
        found, healed = {name: at - began for name, at in left_out.items()}, time.monotonic()
        for number, fault in enumerate(faults):
            await world.heal(fault, number)
        await eventually(world.is_whole, pause=0.05)
        recovered = time.monotonic() - healed
    assert_none_lost(load)
    share = load.share_from(began + SETTLE_SECONDS)
    return Struck(load=load, left_out=found, share=share, recovered=recovered)


def assert_none_lost(load: Load) -> None:
    assert load.broken == []
    assert load.sent == len(load.answered) + len(load.failed)


@contextmanager
def gateway_process(config: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A gateway in a process of its own; its log is beside its configuration."""
    command = [sys.executable, "-m", "matrixinfer", "serve", "--config", str(config)]
    with config.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@asynccontextmanager
async def fault_world(
    folder: Path,
    *,
    engines: int = 3,
    ranks: int = 1,
    eject: float = 0.5,
    longest: float = 1.0,
    delay: float = 0.0,
    front: Front = PLAIN,
) -> AsyncIterator[World]:
    """Everything at work. Ejections last from `eject` to `longest` seconds, the delay of a drain `delay` seconds."""
    ports, port, admin = [free_port() for _ in range(engines)], free_port(), free_port()
    events = "" if ranks > 1 else ", kvEvents: none"
    pods = "\n".join(f"- {{name: e{i}, url: 'http://127.0.0.1:{port}'{events}}}" for i, port in enumerate(ports))
    config = folder / "gateway.yaml"
    settings = {"port": port, "admin": admin, "pods": pods, "eject": eject, "longest": longest, "delay": delay}
    config.write_text(CONFIG.format(**settings, more=front.more))
    async with AsyncExitStack() as stack:
        process = stack.enter_context(gateway_process(config))
        timeout = aiohttp.ClientTimeout(total=DEADLINE_SECONDS)
        connector = aiohttp.TCPConnector(limit=0, ssl=front.context or True)
        session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        await stack.enter_async_context(session)
        url = f"{'http' if front.context is None else 'https'}://127.0.0.1:{port}"
        made = World(ports, ranks, url, f"http://127.0.0.1:{admin}", session, process, front)
        stack.callback(_end, made.engines)
        for number in range(engines):
            made.start(number)
        await eventually(lambda: _is_ready(made), pause=0.1)
        await eventually(made.is_whole, pause=0.05)
        yield made


def _end(engines: list[subprocess.Popen[bytes]]) -> None:
    for engine in engines:
        engine.send_signal(signal.SIGCONT)
        engine.kill()
        engine.wait()


async def _is_ready(world: World) -> bool:
    assert world.process.poll() is None, "the gateway has ended: see its log"
    try:
        for url in (world.gateway, world.admin):  # workers serve before their admin listener does
            async with world.session.get(f"{url}/ready") as response:
                if response.status != 200:
                    return False
    except aiohttp.ClientError:
        return False
    return True
