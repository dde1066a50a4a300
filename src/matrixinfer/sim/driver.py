"""Runs an engine model in real time: steps it, waits for each step's duration, and reports tokens to requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from matrixinfer.sim.model import EngineModel, EngineRequest, Output, StepResult
from matrixinfer.sim.prefix_cache import Event

_MAX_LAG_SECONDS = 0.05
"""A busy engine catches up after late timers, so that it is as fast as the model, but not after longer stalls."""


class Ticket:
    """A request's progress after the last step."""

    def __init__(self) -> None:
        self.generated = 0
        """Tokens of the reply so far."""
        self.cached_tokens = 0
        """Prompt tokens that came from the cache; known with the first token."""
        self._advanced = asyncio.Event()

    async def wait(self, seen: int) -> int:
        """Wait until there are more tokens than `seen`, and return how many."""
        while self.generated <= seen:
            self._advanced.clear()
            await self._advanced.wait()
        return self.generated

    def advance(self, output: Output) -> None:
        """Apply the output of a step."""
        self.generated = output.generated
        self.cached_tokens = output.cached_tokens
        self._advanced.set()


class EngineDriver:
    """Steps a model in its only task, `run`. `publish` gets the events of a step, if any, when the step ends."""

    def __init__(self, model: EngineModel[Any, Any], publish: Callable[[list[Event]], None]) -> None:
        self.model = model
        self._publish = publish
        self._tickets: dict[int, Ticket] = {}
        self._work = asyncio.Event()

    @property
    def in_flight(self) -> int:
        """Requests whose context is open, also when the model has finished them."""
        return len(self._tickets)

    @contextmanager
    def request(self, request: EngineRequest) -> Iterator[Ticket]:
        """Submit a request. Leaving the context aborts it if it is unfinished. Raises `ValueError` as `submit` does."""
        self.model.submit(request)
        ticket = self._tickets[request.id] = Ticket()
        self._work.set()
        try:
            yield ticket
        finally:
            del self._tickets[request.id]
            if ticket.generated < len(request.reply):
                self.model.abort(request.id)

    def publish_idle(self) -> None:
        """Publish the events since the last step now."""
        if events := self.model.take_events():
            self._publish(events)

    async def run(self) -> None:
        """Step while there is work, until cancelled."""
        clock = asyncio.get_running_loop().time
        due = clock()
        while True:
            if not self.model.busy:
                self._work.clear()
                await self._work.wait()
                due = clock()
            model = self.model
            result = model.step()
            due = max(due, clock() - _MAX_LAG_SECONDS) + result.duration
            await asyncio.sleep(due - clock())
            if model is self.model:  # otherwise the engine has restarted during the step
                self._deliver(result)

    def _deliver(self, result: StepResult) -> None:
        if result.events:
            self._publish(result.events)
        for output in result.outputs:
            ticket = self._tickets.get(output.request_id)
            if ticket is not None:
                ticket.advance(output)
