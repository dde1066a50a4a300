"""What is sent through every router, and what that costs: CPU time, and the time that answers take."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

import aiohttp
import msgspec

from bench.peers.routers import Router
from bench.prompts import MODEL, prose
from matrixinfer.prompt.openai import CHAT_PATH

_TURN_CHARS = 1_500
_HEADERS = {"content-type": "application/json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The requests of one round. Every round has requests that nobody has sent before."""

    case: str
    kib: int
    requests: int
    connections: int = 8
    turns: int = 1
    """With more than one, requests are turns of conversations: each is the last one and 1.5 KB."""
    chunks: int = 0
    """Chunks of each answer; 0 for an answer that is not streamed."""

    @property
    def units(self) -> int:
        """How many requests, or chunks, the CPU time is divided by."""
        return self.requests * max(1, self.chunks)

    def bodies(self, seed: int) -> Iterator[bytes]:
        """The bodies of a round, in the order in which they are sent. A quarter of each is the same for all."""
        draw = random.Random(seed)
        system = {"role": "system", "content": prose(0, self.kib * 256)}
        for _ in range(0, self.requests, self.turns):
            messages = [system, {"role": "user", "content": _text(draw, self.kib * 768)}]
            for turn in range(self.turns):
                if turn:
                    messages.append({"role": "assistant", "content": _text(draw, _TURN_CHARS // 2)})
                    messages.append({"role": "user", "content": _text(draw, _TURN_CHARS // 2)})
                body = {"model": MODEL, "messages": messages, "stream": self.chunks > 0}
                yield msgspec.json.encode(body | {"max_tokens": max(1, self.chunks)})


def _text(draw: random.Random, length: int) -> str:
    """Real words in an order that nobody has seen."""
    words = _words()
    return " ".join(draw.choices(words, k=length // 6 + 1)).ljust(length)[:length]


@cache
def _words() -> list[str]:
    return prose(0, 200_000).split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one round through one router took."""

    cpu_us: float
    """CPU time per request or chunk; nan where it is not that of a router."""
    latencies_ms: Sequence[float]
    """Until the answer was complete, in ascending order."""

    def quantile(self, share: float) -> float:
        """A quantile of the latencies in ms."""
        return self.latencies_ms[min(len(self.latencies_ms) - 1, int(share * len(self.latencies_ms)))]


async def measure(session: aiohttp.ClientSession, load: Load, router: Router, seed: int) -> Cost:
    """Send one round. Any failure fails the benchmark."""
    bodies = list(islice(load.bodies(seed), load.requests))
    latencies: list[float] = []
    before = router.cpu_seconds()
    await _send(session, router.url, bodies, load, latencies)
    spent = router.cpu_seconds() - before
    return Cost(cpu_us=spent / load.units * 1e6, latencies_ms=sorted(latencies))


async def _send(
    session: aiohttp.ClientSession, url: str, bodies: Sequence[bytes], load: Load, latencies: list[float]
) -> None:
    """Send the bodies over `connections` connections. The turns of a conversation stay on one, in order."""
    conversations = iter([bodies[at : at + load.turns] for at in range(0, len(bodies), load.turns)])

    async def connection() -> None:
        for turns in conversations:
            for body in turns:
                start = time.perf_counter()
                async with session.post(url + CHAT_PATH, data=body, headers=_HEADERS, raise_for_status=True) as answer:
                    async for _ in answer.content.iter_any():
                        pass
                latencies.append((time.perf_counter() - start) * 1e3)

    async with asyncio.TaskGroup() as group:
        for _ in range(load.connections):
            group.create_task(connection())


LOADS: Sequence[Load] = (
    Load(case="2 KiB, new", kib=2, requests=400),
    Load(case="16 KiB, new", kib=16, requests=240),
    Load(case="64 KiB, new", kib=64, requests=120),
    Load(case="64 KiB, growing", kib=64, requests=160, turns=10),
    Load(case="2 KiB, streamed chunk", kib=2, requests=24, connections=24, chunks=100),
    Load(case="2 KiB, 32 connections", kib=2, requests=640, connections=32),
    Load(case="2 KiB, 512 connections", kib=2, requests=1_024, connections=512),
)
QUICK: Sequence[Load] = (
    Load(case="2 KiB, new", kib=2, requests=8),
    Load(case="2 KiB, growing", kib=2, requests=8, turns=4),
    Load(case="2 KiB, streamed chunk", kib=2, requests=2, connections=2, chunks=5),
)
