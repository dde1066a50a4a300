"""Sends a plan's requests to an engine, and measures when tokens come."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import aiohttp
import msgspec

from matrixinfer.errors import UNREADABLE
from matrixinfer.pods.metrics_text import parse_metrics
from matrixinfer.pods.pod import EngineMetrics
from matrixinfer.study.calibration.fit import CalibrationError, Decode, Prefill
from matrixinfer.study.calibration.plan import Limits, Plan, Task

_ASK_SECONDS = 10.0
_TOKEN_IDS = ((1200, 1900), (10, 250))
"""Ranges that prompts are drawn from: ordinary tokens in large vocabularies, and in tiny ones."""
_DEFAULT_CONTEXT = 4096
_BEHIND_SECONDS = 0.3


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Usage(msgspec.Struct):
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    choices: list[msgspec.Raw] = []
    usage: _Usage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What a live engine says about itself."""

    url: str
    model: str
    context: int
    metrics: EngineMetrics

    def limits(self, max_sequences: int) -> Limits:
        """What it can take."""
        return Limits(context=self.context, cache_tokens=self.metrics.cache_tokens, max_sequences=max_sequences)

    @property
    def is_busy(self) -> bool:
        """Whether it has requests of others."""
        return bool((self.metrics.running or 0) + (self.metrics.waiting or 0))


@dataclass(kw_only=True)
class Measured:
    """All measurements so far."""

    prefills: list[Prefill] = field(default_factory=list)
    decodes: list[Decode] = field(default_factory=list)
    was_cut: bool = False
    """The time ended before the plan did."""
    others: int = 0
    """Times that the engine had requests of others between two tasks."""


async def look(session: aiohttp.ClientSession, url: str) -> Engine:
    """Ask an engine about itself. Raises `CalibrationError`."""
    try:
        async with asyncio.timeout(_ASK_SECONDS):
            models = msgspec.json.decode(await _get(session, f"{url}/v1/models"), type=_Models)
            metrics = parse_metrics(await _get(session, f"{url}/metrics"), read_at=0.0)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise CalibrationError(f"cannot ask {url}: {str(error) or type(error).__name__}") from error
    except UNREADABLE as error:
        raise CalibrationError(f"{url}/v1/models: expected a list of models: {error}") from error
    if not models.data:
        raise CalibrationError(f"{url} serves no model")
    first = models.data[0]
    return Engine(url=url, model=first.id, context=first.max_model_len or _DEFAULT_CONTEXT, metrics=metrics)


async def measure(
    session: aiohttp.ClientSession,
    engine: Engine,
    plan: Plan,
    *,
    seconds: float,
    done: Callable[[int], None] = lambda _: None,
) -> Measured:
    """Send the plan's requests, for at most so many seconds. `done` gets the number of tasks that are over.

    Raises `CalibrationError` when the engine refuses a request, or breaks off.
    """
    found = Measured()
    sender = _Sender(session, engine)
    try:
        async with asyncio.timeout(seconds):
            await sender.find_tokens()
            for number, task in enumerate(plan.tasks):
                await sender.task(task, found)
                found.others += await sender.is_disturbed()
                done(number + 1)
    except TimeoutError:
        found.was_cut = True
    except (aiohttp.ClientError, OSError) as error:
        raise CalibrationError(f"{engine.url} broke off: {str(error) or type(error).__name__}") from error
    return found


class _Sender:
    """Sends prompts that no cache has, and notes when their tokens come."""

    def __init__(self, session: aiohttp.ClientSession, engine: Engine) -> None:
        self._session = session
        self._engine = engine
        self._draw = random.SystemRandom()
        self._tokens = _TOKEN_IDS[0]

    async def find_tokens(self) -> None:
        """Find token ids that the engine's vocabulary has. Also warms the engine up."""
        for tokens in _TOKEN_IDS:
            self._tokens = tokens
            try:
                await self._stream(Task(requests=1, prompt=64, reply=2))
            except CalibrationError:
                if tokens == _TOKEN_IDS[-1]:
                    raise
            else:
                return

    async def task(self, task: Task, found: Measured) -> None:
        """Send the requests of a task at once, and add what it shows."""
        began = time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                sent = [group.create_task(self._stream(task)) for _ in range(task.requests)]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        streams = [each.result() for each in sent]
        if task.reply == 1:
            found.prefills.append(Prefill(tokens=task.prompt, seconds=streams[0][0][0] - began))
            return
        decode = between_tokens(streams, task.prompt)
        if decode is not None:
            found.decodes.append(decode)

    async def is_disturbed(self) -> bool:
        """Whether the engine has requests that are not of this plan. Its gauges may be a moment behind."""
        for _ in range(2):
            metrics = parse_metrics(await _get(self._session, f"{self._engine.url}/metrics"), read_at=0.0)
            if not (metrics.running or 0) + (metrics.waiting or 0):
                return False
            await asyncio.sleep(_BEHIND_SECONDS)
        return True

    async def _stream(self, task: Task) -> list[tuple[float, int]]:
        """When tokens came, with how many there were by then. Raises `CalibrationError`."""
        body = {
            "model": self._engine.model,
            "prompt": [self._draw.randrange(*self._tokens) for _ in range(task.prompt)],
            "max_tokens": task.reply,
            "min_tokens": task.reply,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        headers = {"Content-Type": "application/json"}
        if len(self._engine.metrics.ranks) > 1:
            headers["X-data-parallel-rank"] = "0"
        url = f"{self._engine.url}/v1/completions"
        async with self._session.post(url, data=msgspec.json.encode(body), headers=headers) as response:
            if response.status != 200:
                text = (await response.content.read(500)).decode(errors="replace")
                raise CalibrationError(f"{url} answered {response.status}: {text}")
            return await _tokens(response.content)


async def _tokens(stream: aiohttp.StreamReader) -> list[tuple[float, int]]:
    """When something came, and how many tokens there were by then. Several tokens may come together."""
    seen: list[tuple[float, int]] = []
    count, rest = 0, b""
    async for data in stream.iter_any():
        now, before = time.monotonic(), count
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            count = _counted(line, count)
        if count > before:
            seen.append((now, count))
    if not seen:
        raise CalibrationError("the engine generated no token")
    return seen


def _counted(line: bytes, count: int) -> int:
    """Tokens after a line of the stream, which has brought one more unless it says how many there are."""
    if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
        return count
    try:
        chunk = msgspec.json.decode(line[6:], type=_Chunk)
    except UNREADABLE as error:
        raise CalibrationError(f"expected chunks of a completion: {error}") from error
    if not chunk.choices:
        return count
    reported = None if chunk.usage is None else chunk.usage.completion_tokens
    return count + 1 if reported is None else reported


def between_tokens(streams: Sequence[Sequence[tuple[float, int]]], prompt: int) -> Decode | None:
    """The time between two tokens while all streams generate; None if too few came one by one.

    Before the last one begins, and after the first one ends, steps compute something else.
    """
    begin, end = max(stream[0][0] for stream in streams), min(stream[-1][0] for stream in streams)
    paces, context = [], 0.0
    for stream in streams:
        inside = [each for each in stream if begin <= each[0] <= end]
        if len(inside) < 3:
            return None
        (first_at, first), (last_at, last) = inside[0], inside[-1]
        paces.append((last_at - first_at) / (last - first))
        context += prompt + (first + last) / 2
    return Decode(batch=len(streams), context=round(context), seconds=sorted(paces)[len(paces) // 2])


async def _get(session: aiohttp.ClientSession, url: str) -> bytes:
    async with session.get(url) as response:
        if response.status in (401, 403):
            raise CalibrationError(
                f"{url} answered {response.status}: name the engine's key with --engine-api-key-file"
            )
        if response.status != 200:
            raise CalibrationError(f"{url} answered {response.status}")
        return await response.read()
