"""Token ids from the engines themselves: the `/tokenize` of vLLM and SGLang.

At most two engines are asked for a prompt, another one first each time, and those that failed lately last. Requests that
ask the same at the same time share one answer.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import aiohttp
import msgspec
import numpy as np

from matrixinfer.blocks import TokenIds
from matrixinfer.errors import TokenizeError
from matrixinfer.prompt.base import Prompt, TokenId
from matrixinfer.prompt.tokenize_requests import question

_ENGINES_ASKED = 2
_MAX_QUESTIONS = 1024
"""Different questions under way at once."""
_REST_SECONDS = 5.0
"""An engine that failed is asked last for this long."""
_INLINE_BYTES = 64 * 1024
"""Longer answers are decoded in a thread: it takes 8 ms per MiB."""
_ABSENT_SECONDS = 60.0
"""An engine without the endpoint is not asked for this long."""


class Engine(Protocol):
    """Who can be asked."""

    @property
    def url(self) -> str:
        """Base URL."""
        ...

    @property
    def engine(self) -> str | None:
        """What it calls itself, such as `vllm`; None until it told."""
        ...

    def index_name(self, name: str) -> str | None:
        """Its own name of a model that a client asks for; None when it is not known to serve it."""
        ...


class _Reply(msgspec.Struct):
    tokens: list[TokenId]


_REPLY = msgspec.json.Decoder(_Reply)


def _ids(answer: bytes) -> TokenIds:
    return np.array(_REPLY.decode(answer).tokens, dtype=np.uint32)


class _Failed(TokenizeError):
    """This engine cannot answer now, or not at all (`absent`); another one may."""

    def __init__(self, message: str, *, absent: bool = False) -> None:
        super().__init__(message)
        self.absent = absent


@dataclass(slots=True)
class _Asked:
    """A question under way, and how many wait for its answer."""

    task: asyncio.Task[TokenIds]
    waiting: int = 0


class RemoteTokenizer:
    """Asks engines. Every wait has a deadline: the caller's. With `rests` false those that failed are asked on."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        max_response_bytes: int = 32 * 1024 * 1024,
        rests: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session = session
        self._max_response_bytes = max_response_bytes
        self._rests = rests
        self._clock = clock
        self._turns = itertools.count()
        self._under_way: dict[bytes, _Asked] = {}
        self._resting: dict[str, tuple[float, bool]] = {}  # URL -> until when, and whether the endpoint is absent

    async def tokenize(
        self, prompt: Prompt, engines: Sequence[Engine], model: str, *, timeout_seconds: float
    ) -> TokenIds:
        """The ids of `prompt`, shape (n,), as one of `engines`, which serve `model`, sees it.

        Raises `TokenizeError` when they refuse, fail, answer nonsense or take longer than `timeout_seconds`.
        """
        chosen = self._chosen(engines)
        bodies = [
            msgspec.json.encode(question(prompt, engine.index_name(prompt.model) or model, engine.engine))
            for engine in chosen
        ]
        asked = self._under_way.get(bodies[0])
        if asked is None:
            if len(self._under_way) >= _MAX_QUESTIONS:
                raise TokenizeError(f"{_MAX_QUESTIONS} prompts are being tokenized by engines already")
            asking = self._ask([engine.url for engine in chosen], bodies, timeout_seconds / len(chosen))
            asked = self._under_way[bodies[0]] = _Asked(asyncio.create_task(asking))
            asked.task.add_done_callback(lambda task: self._answered(bodies[0], task))
        asked.waiting += 1
        try:
            async with asyncio.timeout(timeout_seconds):
                return await asyncio.shield(asked.task)
        except TimeoutError as error:
            raise TokenizeError(f"no engine answered within {timeout_seconds} s") from error
        finally:
            asked.waiting -= 1
            if not asked.waiting:
                self._leave(bodies[0], asked.task)  # nobody may join what is about to end
                asked.task.cancel()  # of no effect when it is done

    def _answered(self, body: bytes, task: asyncio.Task[TokenIds]) -> None:
        self._leave(body, task)
        if not task.cancelled():
            task.exception()  # whoever waited has it; when nobody does any more, it is of no interest

    def _leave(self, body: bytes, task: asyncio.Task[TokenIds]) -> None:
        if body in self._under_way and self._under_way[body].task is task:
            del self._under_way[body]

    def _chosen(self, engines: Sequence[Engine]) -> list[Engine]:
        """Whom to ask, in this order. Raises `TokenizeError` when there is nobody."""
        now = self._clock()
        self._resting = {url: rest for url, rest in self._resting.items() if rest[0] > now}
        able = [engine for engine in engines if not self._resting.get(engine.url, (0.0, False))[1]]
        if not able:
            raise TokenizeError("no engine can be asked" if not engines else "the engines have no /tokenize")
        turn = next(self._turns) % len(able)
        order = sorted((*able[turn:], *able[:turn]), key=lambda engine: engine.url in self._resting)
        return order[:_ENGINES_ASKED]

    async def _ask(self, urls: Sequence[str], bodies: Sequence[bytes], timeout_seconds: float) -> TokenIds:
        failures = []
        for url, body in zip(urls, bodies, strict=True):
            try:
                return await self._post(url, body, timeout_seconds)
            except _Failed as error:
                rest = _ABSENT_SECONDS if error.absent else _REST_SECONDS
                if self._rests:
                    self._resting[url] = self._clock() + rest, error.absent
                failures.append(str(error))
        raise TokenizeError("; ".join(failures))

    async def _post(self, url: str, body: bytes, timeout_seconds: float) -> TokenIds:
        """Ask one engine. Raises `TokenizeError` when it refuses the prompt, as others would, and `_Failed` else."""
        try:
            async with self._session.post(
                f"{url.rstrip('/')}/tokenize",
                data=body,
                headers={"Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=timeout_seconds),
                allow_redirects=False,
            ) as response:
                if response.status in (400, 413, 422):
                    raise TokenizeError(f"{url}/tokenize refused the prompt with {response.status}")
                if response.status != 200:
                    absent = response.status in (404, 405)
                    raise _Failed(f"{url}/tokenize answered {response.status}", absent=absent)
                answer = await self._read(response, url)
        except TimeoutError as error:
            raise _Failed(f"{url}/tokenize did not answer in time") from error
        except (aiohttp.ClientError, OSError) as error:
            raise _Failed(f"{url}/tokenize is out of reach: {type(error).__name__}") from error
        try:
            return _ids(answer) if len(answer) <= _INLINE_BYTES else await asyncio.to_thread(_ids, answer)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _Failed(f"{url}/tokenize answered something else than token ids") from error

    async def _read(self, response: aiohttp.ClientResponse, url: str) -> bytes:
        answer = bytearray()
        async for chunk in response.content.iter_any():
            answer += chunk
            if len(answer) > self._max_response_bytes:
                raise _Failed(f"{url}/tokenize answered more than {self._max_response_bytes} bytes")
        return bytes(answer)
