"""The one seam between policy and data path: identify, admit, settle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from multidict import MultiMapping

from matrixinfer.access.callers import Caller
from matrixinfer.access.demand import Demand, Used
from matrixinfer.access.identity import Identifier
from matrixinfer.access.limits import Limits, Reservation
from matrixinfer.access.quota import NOTHING, Amounts
from matrixinfer.access.response_ids import ResponseIds
from matrixinfer.access.salts import Salts
from matrixinfer.errors import Forbidden, LimitExceeded, MatrixInferError, RequestError
from matrixinfer.telemetry.access_metrics import AccessMetrics

MOST_OUTPUT_TOKENS = 1024 * 1024
"""The queue believes no larger bound: it would outweigh all other requests there."""
CLIENT_GONE = 499
"""Status of a request whose client went away before the end of the answer (nginx's convention)."""
TOO_MANY = 429
"""Status with which an engine, too, refuses what it has no room for."""


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
    """The rules for requests; None for those that are off."""

    identifier: Identifier | None = None
    limits: Limits | None = None
    salts: Salts | None = None
    response_ids: ResponseIds | None = None
    queue: Queue | None = None


class Gate:
    """Hands out a ticket to each request."""

    def __init__(self, rules: Rules, metrics: AccessMetrics) -> None:
        self._rules = rules
        self._metrics = metrics

    def reconfigure(self, rules: Rules) -> None:
        """These rules are for new requests; the others keep theirs."""
        self._rules = rules

    @property
    def identifies(self) -> bool:
        """Whether requests need a key or a token."""
        return self._rules.identifier is not None

    async def identify(self, headers: MultiMapping[str]) -> Caller | None:
        """The caller with these headers; None if requests need no key. Raises `Unauthenticated` and `KeysUnavailable`."""
        if self._rules.identifier is None:
            return None
        try:
            return await self._rules.identifier.identify(headers)
        except MatrixInferError as error:
            self._metrics.refused("unauthenticated" if isinstance(error, RequestError) else "keys_unavailable")
            raise

    def ticket(self, caller: Caller | None) -> Ticket:
        """A ticket for one request."""
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
        """The caller, if known."""
        return self._caller

    @property
    def tenant(self) -> str | None:
        """The caller's tenant, if known."""
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

    def new_response_id(self) -> str | None:
        """An id for the response that this request makes, which says whose it is; None if the caller is not known."""
        if self._rules.response_ids is None or self._caller is None:
            return None
        return self._rules.response_ids.new(self._caller.tenant)

    def owns(self, response_id: str) -> bool | None:
        """Whether a stored response is the caller's, as its id says; None if it does not say."""
        if self._rules.response_ids is None or self._caller is None:
            return None
        return self._rules.response_ids.is_owner(self._caller.tenant, response_id)

    def check_model(self, model: str, *, is_sure: bool = True) -> None:
        """Raises `Forbidden` if the caller may not ask for a model, whether or not it exists.

        If an engine may read another name than this one, only callers that may ask for every model may ask.
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
        """Wait until the request may be sent. Returns True if it had to wait: pods and caches may have changed.

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
        """What the request counts for in the end: nothing if it failed through no fault of the client."""
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
