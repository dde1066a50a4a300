"""Holds the conversations over HTTP, and notes what came of every request."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from statistics import mean

import aiohttp

from bench.head_to_head.workload import Conversation
from matrixinfer.prompt.openai import CHAT_PATH

_MAX_TOKENS = 16
_TOTAL_SECONDS = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of one request."""

    ttft: float
    """Seconds until the first token."""
    prompt_tokens: int
    cached_tokens: int


@dataclass(kw_only=True)
class Run:
    """The answers of one run. `when` runs something once so many requests are over."""

    answers: list[Answer] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    when: tuple[int, Callable[[], Awaitable[None]]] | None = None

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that engines report as cached."""
        return sum(each.cached_tokens for each in self.answers) / max(
            1, sum(each.prompt_tokens for each in self.answers)
        )

    @property
    def ttft_ms(self) -> float:
        """The mean time to first token."""
        return mean(each.ttft for each in self.answers) * 1e3 if self.answers else float("nan")

    @property
    def p90_ms(self) -> float:
        """Nine of ten requests had their first token by then."""
        times = sorted(each.ttft for each in self.answers)
        return times[min(len(times) - 1, len(times) * 9 // 10)] * 1e3 if times else float("nan")


class Driver:
    """Clients that hold conversations with the model `model` through routers, which take turns."""

    def __init__(self, session: aiohttp.ClientSession, urls: Sequence[str], model: str) -> None:
        self._session = session
        self._urls: Iterator[str] = cycle(urls)
        self._model = model

    async def hold(self, conversations: Sequence[Conversation], run: Run, turns: slice = slice(None)) -> None:
        """Hold these turns of all conversations, each client on its own."""
        async with asyncio.TaskGroup() as group:
            for each in conversations:
                group.create_task(self._hold(each, run, turns))

    async def _hold(self, conversation: Conversation, run: Run, turns: slice) -> None:
        await asyncio.sleep(conversation.start)
        for messages, think in list(zip(conversation.turns, conversation.thinks, strict=True))[turns]:
            await self._ask(messages, run)
            if run.when is not None and len(run.answers) + len(run.errors) >= run.when[0]:
                act, run.when = run.when[1], None
                await act()
            await asyncio.sleep(think)

    async def _ask(self, messages: Sequence[dict[str, str]], run: Run) -> None:
        body = {
            "model": self._model,
            "messages": messages,
            "max_tokens": _MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        timeout = aiohttp.ClientTimeout(total=_TOTAL_SECONDS)
        start = time.perf_counter()
        try:
            async with self._session.post(next(self._urls) + CHAT_PATH, json=body, timeout=timeout) as response:
                if response.status != 200:
                    run.errors.append(f"status {response.status}")
                    return
                run.answers.append(await _read(response, start))
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            run.errors.append(type(error).__name__)


async def _read(response: aiohttp.ClientResponse, start: float) -> Answer:
    """Read a stream to its end. Raises `ValueError` when it is not whole."""
    ttft, usage = None, None
    async for line in response.content:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if ttft is None and chunk.get("choices") and chunk["choices"][0]["delta"].get("content"):
            ttft = time.perf_counter() - start
        usage = chunk.get("usage") or usage
    if ttft is None or usage is None:
        raise ValueError("the answer has no token or no usage")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Answer(ttft=ttft, prompt_tokens=usage["prompt_tokens"], cached_tokens=cached)
