"""Clients of a simulated engine's API and events, over real sockets."""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import zmq
import zmq.asyncio
from prometheus_client.parser import text_string_to_metric_families

from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.model import Timing
from matrixinfer.sim.publisher import EventPublisher
from matrixinfer.sim.server import SimEngine
from tests.waiting import DEADLINE_SECONDS

Json = dict[str, Any]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CONFIG = SimEngineConfig(
    block_size=4, num_blocks=200, topic="kv-events", timing=Timing(step=0.0005, prefill_token=0, decode_sequence=0)
)
END = b"\xff" * 8


class Client:
    """A client of one engine's API."""

    def __init__(self, engine: SimEngine, session: aiohttp.ClientSession) -> None:
        self.engine = engine
        self.session = session

    async def post(
        self, path: str, body: Json, *, status: int = 200, request_id: str = "r", headers: Mapping[str, str] = {}
    ) -> Json:
        headers = {"x-request-id": request_id, **headers}
        async with self.session.post(path, json={"model": "sim", **body}, headers=headers) as response:
            assert response.status == status, await response.text()
            answer: Json = await response.json()
            return answer

    async def complete(
        self, prompt: list[int], max_tokens: int = 1, *, rank: int | str | None = None, **more: object
    ) -> int:
        """Send a completion and return its cached tokens."""
        body = {"prompt": prompt, "max_tokens": max_tokens, **more}
        answer = await self.post(COMPLETIONS, body, headers={} if rank is None else {"X-data-parallel-rank": str(rank)})
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    async def stream(self, path: str, body: Json) -> list[Json]:
        async with self.session.post(path, json={"model": "sim", "stream": True, **body}) as response:
            assert response.content_type == "text/event-stream"
            events = (await response.read()).decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [msgspec.json.decode(event.removeprefix("data: ")) for event in events[:-2]]

    async def get(self, path: str) -> Any:
        async with self.session.get(path) as response:
            assert response.status == 200
            return await response.json()

    async def metrics(self, rank: int = 0) -> dict[str, float]:
        async with self.session.get("/metrics") as response:
            families = text_string_to_metric_families(await response.text())
            samples = [sample for family in families for sample in family.samples]
            return {sample.name: sample.value for sample in samples if sample.labels.get("engine") == str(rank)}


@asynccontextmanager
async def running(tokenizer: LocalTokenizer, config: SimEngineConfig = CONFIG) -> AsyncIterator[Client]:
    async with SimEngine(config, tokenizer) as engine, aiohttp.ClientSession(engine.url) as session:
        yield Client(engine, session)


@asynccontextmanager
async def command(*flags: str) -> AsyncIterator[Json]:
    """`matrixinfer engine` as a process of its own. Yields what it prints when it is ready."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "matrixinfer", "engine", "--json", "--port", "0", *flags, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        yield msgspec.json.decode(await asyncio.wait_for(process.stdout.readline(), DEADLINE_SECONDS))
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), DEADLINE_SECONDS) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


class Feed:
    """A subscriber to one engine's events."""

    def __init__(self, live: zmq.asyncio.Socket, replay: zmq.asyncio.Socket) -> None:
        self._live = live
        self._replay = replay

    async def next(self) -> list[bytes]:
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await self._live.recv_multipart()

    async def events(self) -> list[Json]:
        return (await self.batch())[0]

    async def replay(self, start: int) -> list[list[bytes]]:
        """All frames of the reply, including the end marker."""
        await self._replay.send_multipart([b"", start.to_bytes(8, "big")])
        frames: list[list[bytes]] = []
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not frames or frames[-1][2] != END:
                frames.append(await self._replay.recv_multipart())
        return frames

    async def batch(self) -> tuple[list[Json], int]:
        """Events and rank of the next frame."""
        _, events, rank = msgspec.msgpack.decode((await self.next())[2])
        return events, rank

    async def is_silent(self) -> bool:
        """Whether no frame arrives for a moment."""
        return not await self._live.poll(100)


@asynccontextmanager
async def subscribed(engine: SimEngine, rank: int = 0) -> AsyncIterator[Feed]:
    publisher = engine.ranks[rank].publisher
    context = zmq.asyncio.Context()
    live, replay = context.socket(zmq.SUB), context.socket(zmq.DEALER)
    try:
        monitor = live.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        live.subscribe(b"")
        live.connect(publisher.endpoint)
        replay.connect(publisher.replay_endpoint)
        async with asyncio.timeout(DEADLINE_SECONDS):
            await monitor.recv_multipart()
            await _subscribed(publisher, live)
        yield Feed(live, replay)
    finally:
        live.disable_monitor()
        context.destroy(linger=0)


async def _subscribed(publisher: EventPublisher, live: zmq.asyncio.Socket) -> None:
    """Wait until the engine's socket has processed the subscription, which it does some time after the handshake."""
    for number in itertools.count():
        last = str(number).encode()
        publisher.send_raw(last)
        if await live.poll(20):
            break
    while await live.recv_multipart() != [last]:
        pass
