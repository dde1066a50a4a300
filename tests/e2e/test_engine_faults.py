"""One of three engines fails, in every way and under every load: no request is lost, and soon none fails.

Real processes: a gateway and three engines. `ENGINE_FAULTS=FILE` has each fault last for ten seconds, and appends the
figures as Markdown rows.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from tests.ports import free_port
from tests.waiting import DEADLINE_SECONDS, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]
ROOT = Path(__file__).parents[2]
FIGURES = os.environ.get("ENGINE_FAULTS")
FAULTS = ("500", "503", "429", "reset", "garbage", "slow", "freeze", "kill", "restart")
LOADS = {"idle": (1, False), "12 in flight": (12, False), "streaming": (12, True)}
"""How many clients there are, and whether they stream."""
SETTLE_SECONDS = 2.0
"""After this long new requests must not fail any more."""
MEASURED_SECONDS = 10.0 if FIGURES else 1.0
CONFIG = """
listen: 127.0.0.1:{port}
admin: 127.0.0.1:{admin}
podWatch: {{scrapeIntervalSeconds: 0.25, scrapeTimeoutSeconds: 0.5}}
outliers: {{ejectSeconds: {eject}, maxEjectSeconds: {longest}}}
pods:
{pods}
"""


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

    def last_failure(self, start: float) -> float:
        """Seconds from `start` until the last failed request was sent; 0 without one."""
        return max((at - start for at, _ in self.failed if at >= start), default=0.0)


@dataclass
class World:
    """The processes."""

    ports: list[int]
    gateway: str
    admin: str
    session: aiohttp.ClientSession
    engines: list[subprocess.Popen[bytes]] = field(default_factory=list)
    numbers: count[int] = field(default_factory=count)

    def start(self, number: int) -> None:
        engine = [sys.executable, "-m", "tests.e2e.faulty_engine", str(self.ports[number])]
        process = subprocess.Popen(engine, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.engines[number : number + 1] = [process]

    async def inflict(self, fault: str) -> None:
        """The first engine fails from now on."""
        engine = self.engines[0]
        if fault == "freeze":
            engine.send_signal(signal.SIGSTOP)
        elif fault in ("kill", "restart"):
            engine.kill()
            engine.wait()
            if fault == "restart":
                self.start(0)
        else:
            await self.set_mode(fault)

    async def heal(self, fault: str) -> None:
        """It is well again, and so is what the gateway thinks of it."""
        if fault == "freeze":
            self.engines[0].send_signal(signal.SIGCONT)
        elif fault == "kill":
            self.start(0)
        await eventually(self.is_up, pause=0.05)
        await self.set_mode("ok")
        await eventually(self.is_whole, pause=0.05)

    async def set_mode(self, mode: str) -> None:
        async with self.session.put(f"http://127.0.0.1:{self.ports[0]}/fault/{mode}") as response:
            assert response.status == 200

    async def is_up(self) -> bool:
        try:
            async with self.session.get(f"http://127.0.0.1:{self.ports[0]}/health") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False

    async def is_whole(self) -> bool:
        """Whether every pod is healthy and gets requests; sends one, which may be the probe."""
        await self.ask(Load(), stream=False)
        async with self.session.get(f"{self.admin}/debug/pods") as response:
            pods = (await response.json())["pods"]
        return len(pods) == len(self.ports) and all(pod["healthy"] and not pod["withheld"] for pod in pods)

    async def ask(self, load: Load, *, stream: bool) -> None:
        body = {"model": "m", "prompt": f"prompt {next(self.numbers)}", "stream": stream}
        load.sent += 1
        start = time.monotonic()
        try:
            async with self.session.post(f"{self.gateway}/v1/completions", data=json.dumps(body)) as response:
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
    async def loaded(self, clients: int, *, stream: bool) -> AsyncIterator[Load]:
        """Clients that ask without a pause while the context is open."""
        load, over = Load(), asyncio.Event()

        async def client() -> None:
            while not over.is_set():
                await self.ask(load, stream=stream)

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
            try:
                yield load
            finally:
                over.set()


def keep(row: str) -> None:
    if FIGURES:
        with Path(FIGURES).open("a") as table:
            table.write(row + "\n")


@contextmanager
def gateway_process(config: Path) -> Iterator[None]:
    """A gateway in a process of its own; its log is beside its configuration."""
    command = [sys.executable, "-m", "matrixinfer", "serve", "--config", str(config)]
    with config.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    folder = tmp_path_factory.mktemp("faults")
    ports, port, admin = [free_port() for _ in range(3)], free_port(), free_port()
    pods = "\n".join(
        f"- {{name: e{i}, url: 'http://127.0.0.1:{port}', kvEvents: none}}" for i, port in enumerate(ports)
    )
    config = folder / "gateway.yaml"
    config.write_text(
        CONFIG.format(
            port=port, admin=admin, pods=pods, eject=5.0 if FIGURES else 0.5, longest=20.0 if FIGURES else 1.0
        )
    )
    timeout = aiohttp.ClientTimeout(total=DEADLINE_SECONDS)
    connector = aiohttp.TCPConnector(limit=0)
    with gateway_process(config):
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            made = World(ports, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin}", session)
            try:
                for number in range(3):
                    made.start(number)
                await eventually(lambda: is_ready(session, made.gateway), pause=0.1)
                await eventually(made.is_whole, pause=0.05)
                yield made
            finally:
                for engine in made.engines:
                    engine.send_signal(signal.SIGCONT)
                    engine.kill()
                    engine.wait()


async def is_ready(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(f"{url}/ready") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


@pytest.mark.parametrize("pressure", LOADS)
@pytest.mark.parametrize("fault", FAULTS)
async def test_no_request_is_lost_and_soon_none_fails(world: World, fault: str, pressure: str) -> None:
    clients, stream = LOADS[pressure]
    async with world.loaded(clients, stream=stream) as load:
        await eventually(lambda: len(load.answered) > 2 * clients)
        began = time.monotonic()
        await world.inflict(fault)
        await asyncio.sleep(SETTLE_SECONDS + MEASURED_SECONDS)
        healed = time.monotonic()
        await world.heal(fault)
        recovered = time.monotonic() - healed
    share = load.share_from(began + SETTLE_SECONDS)
    row = (
        f"| {fault} | {pressure} | {load.sent} | {len(load.answered)} | {len(load.failed)} "
        f"| {load.last_failure(began):.1f} s | {100 * share:.1f} % | {recovered:.1f} s |"
    )
    print(row, sorted({kind for _, kind in load.failed}))
    await asyncio.to_thread(keep, row)
    assert load.broken == []
    assert load.sent == len(load.answered) + len(load.failed)
    assert share >= 0.99
