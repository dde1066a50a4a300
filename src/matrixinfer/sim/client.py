"""A streaming chat client that measures time to first token, and drives whole conversations."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp
import msgspec

from matrixinfer.errors import UNREADABLE
from matrixinfer.sim.workload import Conversation, messages


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of one request, as the client saw it."""

    pod: str | None
    """The pod that answered, according to the gateway."""
    ttft: float | None
    """Seconds from sending the request to its first token; None when there was no token."""
    error: str | None = None


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta


class _Chunk(msgspec.Struct):
    choices: list[_Choice]


_CHUNK = msgspec.json.Decoder(_Chunk)


async def ask(
    session: aiohttp.ClientSession, url: str, model: str, chat: Sequence[dict[str, str]], *, max_tokens: int
) -> tuple[str, Outcome]:
    """Stream one chat completion. Returns the text of the reply, and the outcome."""
    body = {"model": model, "messages": chat, "max_tokens": max_tokens, "stream": True}
    began = time.monotonic()
    pieces: list[str] = []
    ttft: float | None = None
    pod: str | None = None
    done = False
    try:
        async with session.post(f"{url}/v1/chat/completions", data=msgspec.json.encode(body)) as response:
            pod = response.headers.get("x-matrixinfer-pod")
            if response.status != 200:
                return "", Outcome(pod=pod, ttft=None, error=f"status {response.status}")
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    done = True
                    continue
                ttft = time.monotonic() - began if ttft is None else ttft
                pieces += [choice.delta.content or "" for choice in _CHUNK.decode(line[6:]).choices]
    except (aiohttp.ClientError, TimeoutError, *UNREADABLE) as error:
        return "", Outcome(pod=pod, ttft=ttft, error=type(error).__name__)
    return "".join(pieces), Outcome(pod=pod, ttft=ttft, error=None if done else "the stream ended early")


async def converse(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    plan: Sequence[Conversation],
    *,
    max_tokens: int,
    think_seconds: float,
    on_outcome: Callable[[Outcome], None],
) -> None:
    """Hold all conversations of `plan` at the same time. A turn starts `think_seconds` after the last reply."""

    async def hold(conversation: Conversation) -> None:
        await asyncio.sleep(conversation.starts_after)
        replies: list[str] = []
        for turn in range(len(conversation.turns)):
            if turn:
                await asyncio.sleep(think_seconds)
            reply, outcome = await ask(session, url, model, messages(conversation, replies), max_tokens=max_tokens)
            on_outcome(outcome)
            replies.append(reply)

    async with asyncio.TaskGroup() as group:
        for conversation in plan:
            group.create_task(hold(conversation))
