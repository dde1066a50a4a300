"""Clients that mean no good, with everything on: TLS, two workers, keys, limits, salts, a queue, routes, logs and traces.

Whatever they do, they keep nothing: no place, no limit, no connection. And no log repeats what they sent.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from tests import servers
from tests.ports import free_port
from tests.waiting import eventually

from .fault_world import Front, Load, World, assert_none_lost, fault_world
from .production import ALIAS, KEYS, TENANTS, WORKERS, production

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]
CONCURRENT, PLACES, CONNECTIONS = 16, 4, 80
LEASE_SECONDS = 60
"""After which what a dead gateway held in Redis is free again: what is given back is free long before."""
SECRET = "hunter2"
KEY, PROMPT = f"sk-{SECRET}", f"my password is {SECRET}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attacks")


@pytest.fixture(scope="module")
def valkey(folder: Path) -> Iterator[servers.Server]:
    with servers.server(folder / "valkey") as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(folder: Path, valkey: servers.Server) -> AsyncIterator[World]:
    settings = production(folder, redis=valkey.port, places=PLACES, concurrent=CONCURRENT)
    nobody = f"http://127.0.0.1:{free_port()}"
    config = {
        **settings.config,
        "connections": {"max": CONNECTIONS},
        "tracing": {"enabled": True, "endpoint": nobody, "intervalSeconds": 0.2},
    }
    front = Front(
        more="\n".join(f"{key}: {json.dumps(value)}" for key, value in config.items()),
        context=settings.context,
        keys=settings.keys,
        model=ALIAS,
        workers=WORKERS,
    )
    async with fault_world(folder, front=front) as made:
        yield made


class Client:
    """A connection on which bytes are sent as they are given."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def leave(self) -> None:
        self.writer.transport.abort()


async def connected(world: World) -> Client:
    host, port = world.gateway.removeprefix("https://").split(":")
    return Client(*await asyncio.open_connection(host, int(port), ssl=world.front.context))


def request(
    *, stream: bool, length: int | None = None, key: str = KEYS[0], prompt: str = "x", fields: str = ""
) -> bytes:
    body = json.dumps({"model": ALIAS, "prompt": prompt, "stream": stream})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {key}\r\n{fields}"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n{body}".encode()


async def within_the_body(client: Client) -> None:
    await client.send(request(stream=True, length=30_000_000) + b" " * 1_000_000)


async def before_the_answer(client: Client) -> None:
    await client.send(request(stream=False))


async def before_a_stream(client: Client) -> None:
    await client.send(request(stream=True))


async def within_a_stream(client: Client) -> None:
    await client.send(request(stream=True))
    await client.reader.readuntil(b"data: ")


async def with_more_requests_sent(client: Client) -> None:
    await client.send(request(stream=True) * 3 + b"POST /v1/comp")


WAYS = (within_the_body, before_the_answer, before_a_stream, within_a_stream, with_more_requests_sent)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: str(way.__name__))
@pytest.mark.parametrize("pause", [0.0, 0.2])
async def test_clients_that_leave_keep_nothing(
    world: World, valkey: servers.Server, way: Callable[[Client], Awaitable[None]], pause: float
) -> None:
    for number in range(len(world.ports)):
        await world.set_mode("ok" if way is within_a_stream else "slow", number)
    before = descriptors(world)

    async def leave() -> None:
        client = await connected(world)
        try:
            await way(client)
            await asyncio.sleep(pause)
        finally:
            client.leave()

    await asyncio.gather(*(leave() for _ in range(CONCURRENT)))
    async with asyncio.timeout(LEASE_SECONDS / 2):
        await eventually(lambda: nothing_is_held(world, valkey), pause=0.05)
    await eventually(lambda: descriptors(world) <= before + CONCURRENT // 2, pause=0.05)
    for number in range(len(world.ports)):
        await world.set_mode("ok", number)
    load = Load()
    await asyncio.gather(*(world.ask(load, stream=True, key=KEYS[0]) for _ in range(CONCURRENT)))
    assert load.failed == []
    assert_none_lost(load)


async def nothing_is_held(world: World, valkey: servers.Server) -> bool:
    """Whether no request holds a place, waits for one, is charged to a pod, or counts as running."""
    for series in ("matrixinfer_admission_requests{", "matrixinfer_in_flight{"):
        if await world.metric(series):
            return False
    with valkey.client() as client:
        return not any(client.zcard(key) for key in client.scan_iter("matrix:limits:*:running"))


def descriptors(world: World) -> int:
    """Open ones of all processes of the gateway."""
    main = world.process.pid
    children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
    return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in (main, *children))


@pytest.mark.parametrize("fault", ["freeze", "kill", "replica"])
async def test_a_lost_redis_costs_no_request(world: World, valkey: servers.Server, fault: str) -> None:
    async def more(count: int) -> None:
        wanted = len(load.answered) + count
        await eventually(lambda: len(load.answered) > wanted, pause=0.05)

    async def counts_together() -> bool:
        return not await world.metric("matrixinfer_limits_degraded ")

    async with world.loaded(2 * PLACES, stream=None) as load:
        await more(20)
        with broken(valkey, fault):
            await eventually(lambda: is_not(counts_together()), pause=0.05)
            await more(50)
        await eventually(counts_together, pause=0.05)
        await more(20)
    assert load.failed == []
    assert_none_lost(load)
    if fault != "freeze":  # what it had read before it froze ends with its lease
        async with asyncio.timeout(LEASE_SECONDS / 2):
            await eventually(lambda: nothing_is_held(world, valkey), pause=0.05)


@contextmanager
def broken(valkey: servers.Server, fault: str) -> Iterator[None]:
    """A server that does not answer, is gone, or takes no writes."""
    if fault == "replica":
        with valkey.client() as client:
            client.replicaof("127.0.0.1", free_port())
            yield
            client.replicaof("no", "one")
        return
    valkey.freeze() if fault == "freeze" else valkey.kill()
    try:
        yield
    finally:
        valkey.thaw() if fault == "freeze" else valkey.start()


async def is_not(answer: Awaitable[bool]) -> bool:
    return not await answer


async def test_who_connects_and_says_nothing_keeps_nobody_out(world: World) -> None:
    before = descriptors(world)
    host, port = world.gateway.removeprefix("https://").split(":")
    silent = [await asyncio.open_connection(host, int(port)) for _ in range(3 * CONNECTIONS)]
    load = Load()

    async def ask() -> None:
        async with world.connection() as session:
            await world.ask(load, stream=True, session=session)

    try:
        await asyncio.gather(*(ask() for _ in range(CONCURRENT)))
        assert descriptors(world) <= before + CONNECTIONS + CONCURRENT
    finally:
        for _, writer in silent:
            writer.close()
    assert load.failed == []
    assert_none_lost(load)


async def test_no_log_repeats_what_clients_sent(world: World, folder: Path) -> None:
    whole = request(stream=False, key=KEYS[0], prompt=PROMPT, fields=f"x-session-id: {SECRET}\r\n")
    chunked = whole.partition(b"Content-Length")[0] + b"Transfer-Encoding: chunked\r\n\r\n"
    sent = {
        "whole": whole,
        "another key": request(stream=False, key=KEY),
        "short": request(stream=False, length=20, prompt=PROMPT),
        "bad chunk": chunked + f"5\r\n{PROMPT}\r\n0\r\n\r\n".encode(),
        "bad size": chunked + f"{PROMPT}\r\n".encode(),
        "bad header": request(stream=False, key=KEY + "\x01"),
        "long header": request(stream=False, key=KEY + "z" * 9000),
        "bare line feeds": request(stream=False, key=KEY, prompt=PROMPT).replace(b"\r\n", b"\n"),
        "in the path": f"GET /{SECRET}\x01 HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    }
    for name, data in sent.items():
        client = await connected(world)
        try:
            await client.send(data)
            status = (await client.reader.readuntil(b"\r\n")).split()[1]
        finally:
            client.leave()
        assert status in ((b"200",) if name == "whole" else (b"400", b"401", b"431")), name

    def logs() -> str:
        return "".join(path.read_text() for path in (folder / "gateway.log", *folder.glob("access-*.jsonl")))

    for tenant in TENANTS:
        load = Load()
        await world.ask(load, stream=False, key=f"sk-{tenant}")
        assert load.failed == []
    await eventually(lambda: all(f'"tenant":"{tenant}"' in logs() for tenant in TENANTS), pause=0.1)
    await eventually(lambda: logs().count("request_malformed") > 0, pause=0.1)
    pages = "".join([await page(world, path) for path in ("/debug/decisions", "/debug/pods", "/metrics")])
    for text in (logs(), pages):
        assert SECRET not in text
        assert not any(key in text for key in KEYS)


async def page(world: World, path: str) -> str:
    async with world.session.get(world.admin + path) as response:
        assert response.status == 200
        return await response.text()
