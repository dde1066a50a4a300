"""Asks the engines for token ids: the `/tokenize` of vLLM and SGLang.

At most two engines are asked per prompt, in round-robin order; engines that failed recently come last. Concurrent calls
with the same prompt share one answer.
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
from matrixinfer.errors import UNREADABLE, TokenizeError
from matrixinfer.prompt.base import Prompt, TokenId
from matrixinfer.prompt.dialect import dialect_of
from matrixinfer.prompt.tokenize_requests import tokenize_request

_ENGINES_ASKED = 2
_MAX_PROMPTS = 1024
"""Limit of different prompts that are being tokenized at the same time."""
_REST_SECONDS = 5.0
"""For this long, an engine that failed is asked only after the others."""
_INLINE_BYTES = 64 * 1024
"""Longer answers are decoded in a thread: decoding takes 8 ms per MiB."""
_ABSENT_SECONDS = 60.0
"""For this long, an engine without `/tokenize` is not asked at all."""


class Engine(Protocol):
    """An engine that can be asked."""

    @property
    def url(self) -> str:
        """Base URL."""
        ...

    @property
    def engine(self) -> str | None:
        """The engine's own name of its kind, such as `vllm`; None until it has reported it."""
        ...

    @property
    def version(self) -> str | None:
        """The engine's version; None if it does not report it."""
        ...

    def index_name(self, name: str) -> str | None:
        """The engine's own name of the model that a client requested; None if it is not known to serve it."""
        ...


class _Reply(msgspec.Struct):
    tokens: list[TokenId]


_REPLY = msgspec.json.Decoder(_Reply)


def _ids(answer: bytes) -> TokenIds:
    return np.array(_REPLY.decode(answer).tokens, dtype=np.uint32)


class _Failed(TokenizeError):
    """This engine cannot answer now, or has no `/tokenize` at all (`absent`). Another engine may answer."""

    def __init__(self, message: str, *, absent: bool = False) -> None:
        super().__init__(message)
        self.absent = absent


@dataclass(slots=True)
class _Request:
    """A request to the engines, and how many callers wait for its answer."""

    task: asyncio.Task[TokenIds]
    waiting: int = 0


class RemoteTokenizer:
    """Asks engines for token ids, within the caller's deadline. With `rests=False`, engines that failed are not skipped."""

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
        self._under_way: dict[bytes, _Request] = {}
        self._resting: dict[str, tuple[float, bool]] = {}  # URL -> end of the rest, and whether `/tokenize` is absent

    async def tokenize(
        self, prompt: Prompt, engines: Sequence[Engine], model: str, *, timeout_seconds: float
    ) -> TokenIds:
        """The ids of `prompt`, shape (n,), according to one of `engines`, which serve `model`.

        Raises `TokenizeError` if the engines refuse, fail, give an invalid answer or take longer than
        `timeout_seconds`.
        """
        chosen = self._chosen(engines)
        bodies = [
            msgspec.json.encode(
                tokenize_request(
                    prompt, engine.index_name(prompt.model) or model, dialect_of(engine.engine, engine.version)
                )
            )
            for engine in chosen
        ]
        request = self._under_way.get(bodies[0])
        if request is None:
            if len(self._under_way) >= _MAX_PROMPTS:
                raise TokenizeError(f"engines are already tokenizing {_MAX_PROMPTS} prompts")
            asking = self._ask([engine.url for engine in chosen], bodies, timeout_seconds / len(chosen))
            request = self._under_way[bodies[0]] = _Request(asyncio.create_task(asking))
            request.task.add_done_callback(lambda task: self._answered(bodies[0], task))
        request.waiting += 1
        try:
            async with asyncio.timeout(timeout_seconds):
                return await asyncio.shield(request.task)
        except TimeoutError as error:
            raise TokenizeError(f"no engine answered within {timeout_seconds} s") from error
        finally:
            request.waiting -= 1
            if not request.waiting:
                self._leave(bodies[0], request.task)  # a later caller must not join a task that is being cancelled
                request.task.cancel()  # no effect if it is done

    def _answered(self, body: bytes, task: asyncio.Task[TokenIds]) -> None:
        self._leave(body, task)
        if not task.cancelled():
            task.exception()  # mark it as retrieved: waiting callers got it, and without any it does not matter

    def _leave(self, body: bytes, task: asyncio.Task[TokenIds]) -> None:
        if body in self._under_way and self._under_way[body].task is task:
            del self._under_way[body]

    def _chosen(self, engines: Sequence[Engine]) -> list[Engine]:
        """The engines to ask, in this order. Raises `TokenizeError` if there is none."""
        now = self._clock()
        self._resting = {url: rest for url, rest in self._resting.items() if rest[0] > now}
        able = [engine for engine in engines if not self._resting.get(engine.url, (0.0, False))[1]]
        if not able:
            raise TokenizeError("there is no engine to ask" if not engines else "the engines have no /tokenize")
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
        """Ask one engine. Raises `TokenizeError` if it refuses the prompt, as others would too; else `_Failed`."""
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
            raise _Failed(f"cannot reach {url}/tokenize: {type(error).__name__}") from error
        try:
            return _ids(answer) if len(answer) <= _INLINE_BYTES else await asyncio.to_thread(_ids, answer)
        except UNREADABLE as error:
            raise _Failed(f"{url}/tokenize did not answer with token ids") from error

    async def _read(self, response: aiohttp.ClientResponse, url: str) -> bytes:
        answer = bytearray()
        async for chunk in response.content.iter_any():
            answer += chunk
            if len(answer) > self._max_response_bytes:
                raise _Failed(f"{url}/tokenize answered with more than {self._max_response_bytes} bytes")
        return bytes(answer)
