"""Clients of a soak: polite ones, and those that leave, read slowly, send much or close half of their connection."""

from __future__ import annotations

import asyncio
import io
import json
import random
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from tests.soak.fleet import MODEL

HUNG_SECONDS = 60.0
"""The gateway's own limits end every request long before."""
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LARGE_BYTES = 3_000_000
WORDS = ("cache", "engine", "holds", "what", "it", "has", "read", "before", "and", "so", "the", "next", "goes", "there")
DONE = b"data: [DONE]\n\n"


@dataclass
class Tally:
    """What became of all requests."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By behaviour, and `answered`, `failed` (in a way that the client sees) or `left` (by the client's own will)."""
    failures: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """Requests without an end, answers that look whole and are not, and answers to another request."""

    def total(self, outcome: str) -> int:
        return sum(number for (_, ended), number in self.outcomes.items() if ended == outcome)

    @property
    def sent(self) -> int:
        return self.outcomes.total()

    @property
    def answered_share(self) -> float:
        """Of the requests whose clients waited for the answer."""
        answered, failed = self.total("answered"), self.total("failed")
        return answered / (answered + failed) if answered + failed else 1.0


class Wrong(Exception):
    """The gateway did what it must never do."""


class Failed(Exception):
    """A request failed, and the client can see it."""


class Client:
    """Sends one request after the other to the gateways, and puts down how each ended."""

    def __init__(
        self, urls: Sequence[str], session: aiohttp.ClientSession, tally: Tally, numbers: count[int], seed: int
    ) -> None:
        self._urls = urls
        self._session = session
        self._tally = tally
        self._numbers = numbers
        self._random = random.Random(seed)
        self._talk = ""
        self._ways: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
            "chat": (30, self._chat),
            "streamed chat": (30, self._streamed_chat),
            "tokens": (20, self._tokens),
            "large body": (3, self._large),
            "slow reader": (4, self._slow_reader),
            "half-closed": (4, self._half_closed),
            "leaves in upload": (3, self._leaves_in_upload),
            "leaves before first byte": (4, self._leaves_early),
            "leaves in stream": (5, self._leaves_in_stream),
            "mistaken": (3, self._mistaken),
        }

    async def run(self, over: asyncio.Event) -> None:
        """Go on until it is over."""
        names = list(self._ways)
        weights = [weight for weight, _ in self._ways.values()]
        while not over.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), self._random.uniform(0.0, 2.0))
            (name,) = self._random.choices(names, weights)
            self._tally.outcomes[name, await self._ends(name)] += 1

    async def _ends(self, name: str) -> str:
        try:
            async with asyncio.timeout(HUNG_SECONDS):
                await self._ways[name][1]()
        except Failed as failure:
            self._tally.failures[str(failure)] += 1
            return "failed"
        except Wrong as error:
            self._tally.wrong.append(f"{name}: {error}")
            return "failed"
        except TimeoutError:
            self._tally.wrong.append(f"{name}: no end after {HUNG_SECONDS:.0f} s")
            return "failed"
        except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError) as error:
            self._tally.failures[type(error).__name__] += 1
            return "failed"
        return "left" if name.startswith("leaves") else "answered"

    @property
    def _url(self) -> str:
        return self._random.choice(self._urls)

    def _text(self, words: int) -> str:
        return " ".join(self._random.choices(WORDS, k=words))

    def _body(self, *, stream: bool, tokens: int = 8) -> dict[str, Any]:
        """The next turn of a conversation, or a new one."""
        if len(self._talk) > 12_000 or self._random.random() < 0.1:
            self._talk = f"Shared beginning {self._random.randrange(20)}. " + "All conversations begin so. " * 40
        self._talk += self._text(60)
        messages = [{"role": "user", "content": self._talk}]
        return {"model": MODEL, "messages": messages, "max_tokens": tokens, "stream": stream}

    async def _chat(self) -> None:
        await self._ask(CHAT, self._body(stream=False))

    async def _streamed_chat(self) -> None:
        await self._ask(CHAT, self._body(stream=True, tokens=self._random.randrange(1, 40)))

    async def _tokens(self) -> None:
        prompt = [self._random.randrange(20)] * self._random.randrange(1, 900)
        answer = await self._ask(COMPLETIONS, {"model": MODEL, "prompt": prompt, "max_tokens": 2})
        usage = json.loads(answer).get("usage")
        if usage is not None and usage["prompt_tokens"] != len(prompt):
            raise Wrong(f"{usage['prompt_tokens']} prompt tokens in the answer to a prompt of {len(prompt)}")

    async def _large(self) -> None:
        await self._ask(COMPLETIONS, {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 2, "user": "x" * LARGE_BYTES})

    async def _mistaken(self) -> None:
        """What must be refused is refused."""
        body, status = self._random.choice([(b"{", 400), (b'{"model":"other","prompt":"x"}', 404), (b"[]", 400)])
        async with self._session.post(self._url + COMPLETIONS, data=body) as response:
            await response.read()
            if response.status not in (status, 503):  # while no pod answers, nobody knows which models there are
                raise Wrong(f"{response.status} instead of {status}")

    async def _ask(self, path: str, body: dict[str, Any]) -> bytes:
        """The whole answer, which must be one to this request."""
        identity = f"soak-{next(self._numbers)}"
        headers = {"Content-Type": "application/json", "x-request-id": identity}
        data = io.BytesIO(json.dumps(body).encode())
        async with self._session.post(self._url + path, data=data, headers=headers) as response:
            answer = await response.read()
            if response.headers.get("x-request-id") != identity:
                raise Wrong(f"request {identity} got the answer to {response.headers.get('x-request-id')}")
            self._check(response.status, answer, stream=body.get("stream", False))
        return answer

    @staticmethod
    def _check(status: int, answer: bytes, *, stream: bool) -> None:
        if status >= 500 or status == 429:
            json.loads(answer)
            raise Failed(str(status))
        if status != 200:
            raise Wrong(f"{status}: {answer[:100]!r}")
        if not answer.endswith(DONE if stream else b"}"):
            raise Wrong(f"an answer that ends with {answer[-40:]!r} and looks whole")

    async def _connect(self, *, receives: int | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        address = urlsplit(self._url)
        sock = socket.socket()
        sock.setblocking(False)
        if receives is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
        await asyncio.get_running_loop().sock_connect(sock, (address.hostname or "", address.port or 0))
        return await asyncio.open_connection(sock=sock, limit=2**20 if receives is None else receives)

    async def _send(self, writer: asyncio.StreamWriter, body: dict[str, Any], *, share: float = 1.0) -> None:
        data = json.dumps(body).encode()
        writer.write(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" % CHAT.encode())
        writer.write(b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data[: int(len(data) * share)]))
        await writer.drain()

    async def _slow_reader(self) -> None:
        reader, writer = await self._connect(receives=4096)
        try:
            await self._send(writer, self._body(stream=True, tokens=200))
            self._check(*await read_answer(reader, pause=0.03), stream=True)
        finally:
            writer.transport.abort()

    async def _half_closed(self) -> None:
        reader, writer = await self._connect()
        try:
            stream = self._random.random() < 0.5
            await self._send(writer, self._body(stream=stream))
            writer.write_eof()
            self._check(*await read_answer(reader), stream=stream)
        finally:
            writer.transport.abort()

    async def _leaves_in_upload(self) -> None:
        _, writer = await self._connect()
        body = self._body(stream=False) | {"user": "x" * self._random.choice([10, 100_000, LARGE_BYTES])}
        try:
            await self._send(writer, body, share=self._random.random())
            await asyncio.sleep(self._random.uniform(0.0, 0.5))
        finally:
            writer.transport.abort()

    async def _leaves_early(self) -> None:
        _, writer = await self._connect()
        try:
            await self._send(writer, self._body(stream=self._random.random() < 0.5, tokens=100))
            await asyncio.sleep(self._random.uniform(0.0, 0.02))
        finally:
            if self._random.random() < 0.5:
                writer.transport.abort()
            else:
                writer.close()

    async def _leaves_in_stream(self) -> None:
        reader, writer = await self._connect()
        try:
            await self._send(writer, self._body(stream=True, tokens=200))
            await reader.readuntil(b"data: ")
            await asyncio.sleep(self._random.uniform(0.0, 0.2))
        finally:
            writer.transport.abort()


async def read_answer(reader: asyncio.StreamReader, *, pause: float = 0.0) -> tuple[int, bytes]:
    """Status and body of an answer after which the connection closes. Raises `IncompleteReadError` if it is cut off."""
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 1"):  # an interim response
            break
    chunked = b"\r\ntransfer-encoding: chunked" in head.lower()
    length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), None)
    pieces = []
    if chunked:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            pieces.append((await reader.readexactly(size + 2))[:-2])
            await asyncio.sleep(pause)
        await reader.readexactly(2)
    else:
        if length is None:
            raise Wrong("an answer without a length")
        pieces.append(await reader.readexactly(length))
    return int(head[9:12]), b"".join(pieces)
