"""The one seam between policy and data path: identify, admit, settle."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import msgspec
from multidict import MultiMapping

from matrixinfer.access.callers import Caller
from matrixinfer.access.identity import Identifier
from matrixinfer.access.limits import Limits, Reservation
from matrixinfer.access.quota import NOTHING, Amounts
from matrixinfer.access.salts import Salts
from matrixinfer.errors import UNREADABLE, Forbidden, LimitExceeded, MatrixInferError, RequestError
from matrixinfer.telemetry.access_metrics import AccessMetrics

ASSUMED_OUTPUT_TOKENS = 512
"""What a request that does not bound its answer is taken to generate, until the engine reports it."""


MOST_OUTPUT_TOKENS = 1024 * 1024
"""More than a request may generate by its own word is not believed in the queue: it would outweigh all others there."""
INLINE_BYTES = 256 * 1024
"""Longer bodies are searched in a thread."""
CLIENT_GONE = 499
"""Status of a request whose client went away before the end of the answer (nginx's convention)."""
TOO_MANY = 429
"""Status with which an engine, too, refuses what it has no room for."""


class Demand(NamedTuple):
    """What a request asks for, as far as it is known before it is sent."""

    input_tokens: int
    cached_tokens: int
    """Of these, what the endpoint that holds most of the prompt is predicted to find in its cache."""
    generates: bool
    """Whether the engine generates text, and not only reads the prompt."""
    body: bytes

    async def output_tokens(self) -> int:
        """The most that the engine may generate, by the request's own word."""
        if not self.generates:
            return 0
        if len(self.body) <= INLINE_BYTES:
            return _output_tokens(self.body)
        return await asyncio.to_thread(_output_tokens, self.body)


class Used(NamedTuple):
    """What an engine reports."""

    input_tokens: int
    cached_tokens: int | None
    output_tokens: int | None
    """None if nothing is generated, as for embeddings."""

    @property
    def computed(self) -> int:
        """Tokens that the engine has computed or generated."""
        return max(0, self.input_tokens - (self.cached_tokens or 0)) + (self.output_tokens or 0)


class Place(Protocol):
    """A request's place among those that are admitted."""

    @property
    def waited(self) -> bool:
        """Whether the request had to wait for it."""
        ...

    def leave(self, cost: int | None) -> None:
        """The request has ended, and has cost so many tokens; None if that is not known."""
        ...


class Queue(Protocol):
    """Where requests wait for their turn."""

    async def enter(self, tenant: str, cost: int) -> Place:
        """Wait for a place for a request that costs so many tokens. Raises `Overloaded`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What is decided about requests; None for what is not."""

    identifier: Identifier | None = None
    limits: Limits | None = None
    salts: Salts | None = None
    queue: Queue | None = None


class Gate:
    """Hands out a ticket to each request."""

    def __init__(self, rules: Rules, metrics: AccessMetrics) -> None:
        self._rules = rules
        self._metrics = metrics

    @property
    def identifies(self) -> bool:
        """Whether requests need a key or a token."""
        return self._rules.identifier is not None

    async def identify(self, headers: MultiMapping[str]) -> Caller | None:
        """Whose request that is. Raises `Unauthenticated` and `KeysUnavailable`."""
        if self._rules.identifier is None:
            return None
        try:
            return await self._rules.identifier.identify(headers)
        except MatrixInferError as error:
            self._metrics.refused("unauthenticated" if isinstance(error, RequestError) else "keys_unavailable")
            raise

    def ticket(self, caller: Caller | None) -> Ticket:
        """For one request."""
        return Ticket(self._rules, self._metrics, caller)


class Ticket:
    """What one request was promised. `close` it when the request ends, however that is."""

    __slots__ = (
        *("_caller", "_is_admitted", "_metrics", "_place", "_reservation", "_rules", "_used", "_was_served"),
        "headers",
    )

    def __init__(self, rules: Rules, metrics: AccessMetrics, caller: Caller | None) -> None:
        self._rules = rules
        self._metrics = metrics
        self._caller = caller
        self._reservation: Reservation | None = None
        self._place: Place | None = None
        self._used: Used | None = None
        self._is_admitted = False
        self._was_served = False
        self.headers: Mapping[str, str] = {}
        """Headers of the answer: what is left of the caller's limits."""

    @property
    def caller(self) -> Caller | None:
        """Whose request it is, if that is known."""
        return self._caller

    @property
    def tenant(self) -> str | None:
        """Whose tenant's request it is, if that is known."""
        return None if self._caller is None else self._caller.tenant

    @property
    def wants_usage(self) -> bool:
        """Whether the engine should report what the request has used."""
        return self._caller is not None

    @property
    def is_authenticated(self) -> bool:
        """Whether the gateway knows the caller."""
        return self._caller is not None

    @property
    def isolates(self) -> bool:
        """Whether the request needs a salt of its tenant."""
        return self._rules.salts is not None and self._caller is not None

    def salt(self, own: str | None) -> str | None:
        """The salt of the request, whose client asked for the salt `own`."""
        if self._rules.salts is None or self._caller is None:
            return own
        return self._rules.salts.of(self._caller.tenant, own)

    def check_model(self, model: str, *, is_sure: bool = True) -> None:
        """Raises `Forbidden` if the caller may not ask for a model, whether there is one of that name or not.

        If it is not sure that an engine reads the same name, only those may ask who may ask for any.
        """
        if self._caller is None:
            return
        try:
            if not is_sure:
                self._caller.check_any_model()
            self._caller.check_model(model)
        except Forbidden:
            self._metrics.refused("model")
            raise

    async def admit(self, demand: Demand) -> bool:
        """Wait until the request may be sent. Returns whether that took a while, so that things may have changed.

        Raises `LimitExceeded` and `Overloaded`.
        """
        caller = self._caller
        if caller is not None:
            await self._reserve(caller, demand)
        if self._rules.queue is not None:
            output_tokens = min(await demand.output_tokens(), MOST_OUTPUT_TOKENS)
            cost = max(0, demand.input_tokens - demand.cached_tokens) + output_tokens
            self._place = await self._rules.queue.enter("" if caller is None else caller.tenant, cost)
        self._is_admitted = True
        return self._place is not None and self._place.waited

    def used(self, used: Used) -> None:
        """The engine has reported what the request has used."""
        self._used = used

    def served(self) -> None:
        """The engine has computed the prompt: it counts, whatever becomes of the answer."""
        self._was_served = True

    def close(self, code: int) -> None:
        """The request has ended with that status; 499 if its client has gone."""
        if self._place is not None:
            self._place.leave(self._used and self._used.computed)
            self._place = None
        reservation, self._reservation = self._reservation, None
        if reservation is not None and self._rules.limits is not None:
            self._rules.limits.settle(reservation, self._settled(reservation.taken, code))
        if self._used is not None and self._caller is not None:
            self._metrics.tenant_used(self._caller.tenant, *self._used)
            self._used = None

    async def _reserve(self, caller: Caller, demand: Demand) -> None:
        if self._rules.limits is None:
            return
        amounts = Amounts(
            requests=1,
            input_tokens=demand.input_tokens,
            output_tokens=0 if caller.quota.output_tokens is None else await demand.output_tokens(),
            uncached_tokens=max(0, demand.input_tokens - demand.cached_tokens),
        )
        try:
            self._reservation = await self._rules.limits.reserve(caller, amounts)
        except LimitExceeded as error:
            self._metrics.refused(f"limit_{error.kind}")
            raise
        if self._reservation is not None:
            self.headers = self._reservation.headers

    def _settled(self, taken: Amounts, code: int) -> Amounts:
        """What the request counts for in the end: what failed for no fault of the client counts nothing."""
        used = self._used
        if code >= 500:
            return NOTHING
        if used is None:  # nothing was computed, or how much was not said
            if self._was_served or (code == CLIENT_GONE and self._is_admitted):
                return taken
            return Amounts(requests=1) if 400 <= code < CLIENT_GONE and code != TOO_MANY else NOTHING
        cached = used.cached_tokens or 0
        return Amounts(
            requests=taken.requests,
            input_tokens=used.input_tokens,
            output_tokens=used.output_tokens or 0,
            uncached_tokens=max(0, used.input_tokens - cached),
        )


class _Bounds(msgspec.Struct):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    n: int | None = None


_BOUNDS = msgspec.json.Decoder(_Bounds)


def _output_tokens(body: bytes) -> int:
    """The most that a request may generate, by its own word."""
    try:
        bounds = _BOUNDS.decode(body)
    except UNREADABLE:
        return ASSUMED_OUTPUT_TOKENS
    given = bounds.max_completion_tokens or bounds.max_output_tokens or bounds.max_tokens
    return max(1, ASSUMED_OUTPUT_TOKENS if given is None else given) * max(1, bounds.n or 1)
