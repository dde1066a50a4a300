"""Token ids that an engine sends after the decision that they were asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import structlog

from matrixinfer.errors import TokenizeError
from matrixinfer.prompt.base import Tokenized
from matrixinfer.tasks import cancel_all

MAX_LATE = 64
"""Limit of prompts whose token ids are still asked for while nobody waits for them."""

log = structlog.get_logger(__name__)


class TokensLate(TokenizeError):
    """An engine has not sent the token ids in time. It is still being asked: `then` passes them on when they come."""

    def __init__(
        self, message: str, asking: asyncio.Task[Tokenized], keep: Callable[[asyncio.Task[None]], None]
    ) -> None:
        super().__init__(message)
        self._asking = asking
        self._keep = keep

    def then(self, use: Callable[[Tokenized], Awaitable[None]]) -> None:
        """Call `use` with the token ids when they come, and not if they never do."""
        self._keep(asyncio.create_task(self._pass_on(use)))

    async def _pass_on(self, use: Callable[[Tokenized], Awaitable[None]]) -> None:
        try:
            tokenized = await self._asking
        except TokenizeError:
            return
        try:
            await use(tokenized)
        except Exception:
            # Supervision boundary: the request is served whatever becomes of its token ids.
            log.exception("late_tokens_failed")


class LateAnswers:
    """Waits for engines only briefly, and owns what goes on after that: asking them, and passing the token ids on."""

    def __init__(self) -> None:
        self._asking: set[asyncio.Task[Tokenized]] = set()
        self._passing: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Prompts whose token ids are still asked for while nobody waits for them."""
        return len(self._asking)

    def check_room(self) -> None:
        """Raise `TokenizeError` if too many answers are late already."""
        if len(self._asking) >= MAX_LATE:
            raise TokenizeError(f"engines have not sent the token ids of {MAX_LATE} earlier prompts yet")

    async def wait(self, asks: Coroutine[Any, Any, Tokenized], seconds: float) -> Tokenized:
        """What `asks` returns. Raises `TokensLate` if that takes longer; it ends with its caller before that."""
        asking = asyncio.create_task(asks)
        try:
            await asyncio.wait((asking,), timeout=seconds)
        except asyncio.CancelledError:
            asking.cancel()
            raise
        if asking.done():
            return asking.result()
        self._asking.add(asking)
        asking.add_done_callback(self._arrived)
        raise TokensLate(f"the engine did not send them within {seconds * 1e3:g} ms", asking, self._pass)

    async def close(self) -> None:
        """Ask, and pass on, no more."""
        await cancel_all([*self._asking, *self._passing])

    def _arrived(self, asking: asyncio.Task[Tokenized]) -> None:
        self._asking.discard(asking)
        if not asking.cancelled():
            asking.exception()  # mark it as retrieved: nobody may be waiting any more

    def _pass(self, task: asyncio.Task[None]) -> None:
        self._passing.add(task)
        task.add_done_callback(self._passing.discard)
