"""Runs an engine model in real time: steps it, lets the steps take their time, tells requests of their tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from matrixinfer.sim.events import Event
from matrixinfer.sim.model import EngineModel, EngineRequest, Output, StepResult

_MAX_LAG_SECONDS = 0.05
"""A busy engine makes up for late timers so that its rate is the model's, but not for longer stalls."""


class Ticket:
    """A request's progress as the last step left it."""

    def __init__(self) -> None:
        self.generated = 0
        """Tokens of the reply so far."""
        self.cached_tokens = 0
        """Prompt tokens that came from the cache; known with the first token."""
        self._news = asyncio.Event()

    async def wait(self, seen: int) -> int:
        """How many tokens there are, once there are more than `seen`."""
        while self.generated <= seen:
            self._news.clear()
            await self._news.wait()
        return self.generated

    def advance(self, output: Output) -> None:
        """Take a step's news."""
        self.generated = output.generated
        self.cached_tokens = output.cached_tokens
        self._news.set()


class EngineDriver:
    """Steps a model. `run` is its one task; `publish` gets the events of each step that has any, when it ends."""

    def __init__(self, model: EngineModel, publish: Callable[[list[Event]], None]) -> None:
        self.model = model
        self._publish = publish
        self._tickets: dict[int, Ticket] = {}
        self._work = asyncio.Event()

    @property
    def in_flight(self) -> int:
        """Requests that are open, whatever the model knows of them."""
        return len(self._tickets)

    @contextmanager
    def request(self, request: EngineRequest) -> Iterator[Ticket]:
        """Submit a request; leaving the context aborts what is left of it. Raises `ValueError` as `submit` does."""
        self.model.submit(request)
        ticket = self._tickets[request.id] = Ticket()
        self._work.set()
        try:
            yield ticket
        finally:
            del self._tickets[request.id]
            if ticket.generated < len(request.reply):
                self.model.abort(request.id)

    async def run(self) -> None:
        """Step whenever there is work, until cancelled."""
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
            if model is self.model:  # else the engine has restarted meanwhile
                self._deliver(result)

    def _deliver(self, result: StepResult) -> None:
        if result.events:
            self._publish(result.events)
        for output in result.outputs:
            ticket = self._tickets.get(output.request_id)
            if ticket is not None:
                ticket.advance(output)
