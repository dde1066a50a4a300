"""Asks the engines for token ids: the `/tokenize` of vLLM and SGLang.

At most two engines are asked per prompt, in round-robin order; engines that failed recently come last. Concurrent calls
with the same prompt share one answer, and the last answers are remembered.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

import aiohttp
import msgspec
import numpy as np

from matrixinfer.blocks import TokenIds
from matrixinfer.errors import UNREADABLE, TokenizeError, shortage_in
from matrixinfer.prompt.base import Prompt, TokenId
from matrixinfer.prompt.cache import Lru
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
_MAX_MODELS = 256
_COSTS_KEPT = 128
_FEW = 8
"""With fewer answers, nothing is said about how long the next one takes."""


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


class PromptRefused(TokenizeError):
    """The engine's `/tokenize` does not take this prompt, and never will."""


class _Failed(TokenizeError):
    """This engine cannot answer now, or has no `/tokenize` at all (`absent`). Another engine may answer."""

    def __init__(self, message: str, *, absent: bool = False) -> None:
        super().__init__(message)
        self.absent = absent


@dataclass(slots=True, eq=False)
class Cost:
    """How long engines took to tokenize the last prompts of one model."""

    answers: int = 0
    """How many engines have answered."""
    failures: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_COSTS_KEPT))

    def quantile(self, share: float) -> float | None:
        """The time, in seconds, within which this share of the last prompts was tokenized; None if there are too few."""
        if len(self.seconds) < _FEW:
            return None
        return sorted(self.seconds)[int(share * (len(self.seconds) - 1))]

    def view(self) -> dict[str, object]:
        """As JSON-able data, in milliseconds."""
        ordered = sorted(self.seconds)
        shown = {
            name: round(ordered[int(share * (len(ordered) - 1))] * 1e3, 2) if ordered else None
            for name, share in (("p50_ms", 0.5), ("p90_ms", 0.9))
        }
        return {"answers": self.answers, "failures": self.failures, **shown}


@dataclass(slots=True)
class _Request:
    """A request to the engines, and how many callers wait for its answer."""

    task: asyncio.Task[TokenIds]
    waiting: int = 0


class RemoteTokenizer:
    """Asks engines for token ids, within the caller's deadline.

    With `rests=False`, engines that failed are not skipped, and each engine is asked itself: one's answer is never taken
    for another's.

    Answers are remembered in up to `cache_bytes`, until `forget`. `on_answered` is called with the model and the seconds
    that its engine took.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        max_response_bytes: int = 32 * 1024 * 1024,
        rests: bool = True,
        cache_bytes: int = 0,
        on_answered: Callable[[str, float], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session = session
        self._max_response_bytes = max_response_bytes
        self._rests = rests
        self._on_answered = on_answered
        self._clock = clock
        self._known: Lru[bytes, TokenIds] = Lru(cache_bytes)
        self.costs: dict[str, Cost] = {}
        """What asking has cost, by model."""
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
        key = _digest(bodies[0], "" if self._rests else chosen[0].url)
        known = self._known.get(key)
        if known is not None:
            return known
        request = self._under_way.get(key)
        if request is None:
            if len(self._under_way) >= _MAX_PROMPTS:
                raise TokenizeError(f"engines are already tokenizing {_MAX_PROMPTS} prompts")
            asking = self._ask(model, [engine.url for engine in chosen], bodies, timeout_seconds / len(chosen))
            request = self._under_way[key] = _Request(asyncio.create_task(asking))
            request.task.add_done_callback(lambda task: self._answered(key, task))
        request.waiting += 1
        try:
            async with asyncio.timeout(timeout_seconds):
                return await asyncio.shield(request.task)
        except TimeoutError as error:
            raise TokenizeError(f"no engine answered within {timeout_seconds} s") from error
        finally:
            request.waiting -= 1
            if not request.waiting:
                self._leave(key, request.task)  # a later caller must not join a task that is being cancelled
                request.task.cancel()  # no effect if it is done

    def forget(self) -> None:
        """Forget all remembered answers: an engine may now give others."""
        self._known.clear()

    def _answered(self, key: bytes, task: asyncio.Task[TokenIds]) -> None:
        self._leave(key, task)
        # Reading the exception marks it as retrieved: waiting callers got it, and without any it does not matter.
        if not task.cancelled() and task.exception() is None:
            self._known.put(key, task.result(), task.result().nbytes)

    def _leave(self, key: bytes, task: asyncio.Task[TokenIds]) -> None:
        if key in self._under_way and self._under_way[key].task is task:
            del self._under_way[key]

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

    async def _ask(self, model: str, urls: Sequence[str], bodies: Sequence[bytes], timeout_seconds: float) -> TokenIds:
        failures = []
        cost = self._cost(model)
        for url, body in zip(urls, bodies, strict=True):
            start = self._clock()
            try:
                ids = await self._post(url, body, timeout_seconds)
            except _Failed as error:
                cost.failures += 1
                rest = _ABSENT_SECONDS if error.absent else _REST_SECONDS
                if self._rests:
                    self._resting[url] = self._clock() + rest, error.absent
                failures.append(str(error))
            else:
                took = self._clock() - start
                cost.answers += 1
                cost.seconds.append(took)
                if self._on_answered is not None:
                    self._on_answered(model, took)
                return ids
        raise TokenizeError("; ".join(failures))

    def _cost(self, model: str) -> Cost:
        if model not in self.costs and len(self.costs) >= _MAX_MODELS:
            del self.costs[next(iter(self.costs))]
        return self.costs.setdefault(model, Cost())

    async def _post(self, url: str, body: bytes, timeout_seconds: float) -> TokenIds:
        """Ask one engine. Raises `PromptRefused` if it refuses the prompt, as others would too; else `_Failed`."""
        try:
            async with self._session.post(
                f"{url.rstrip('/')}/tokenize",
                data=body,
                headers={"Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=timeout_seconds),
                allow_redirects=False,
            ) as response:
                if response.status in (400, 413, 422):
                    raise PromptRefused(f"{url}/tokenize refused the prompt with {response.status}")
                if response.status != 200:
                    absent = response.status in (404, 405)
                    raise _Failed(f"{url}/tokenize answered {response.status}", absent=absent)
                answer = await self._read(response, url)
        except TimeoutError as error:
            raise _Failed(f"{url}/tokenize did not answer in time") from error
        except (aiohttp.ClientError, OSError) as error:
            shortage = shortage_in(error)
            if shortage is not None:  # which says nothing about the engine
                raise TokenizeError(f"cannot ask {url}/tokenize: {shortage}") from error
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


def _digest(body: bytes, url: str) -> bytes:
    return blake2b(body, digest_size=20, key=blake2b(url.encode()).digest()).digest()
