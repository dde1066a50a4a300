"""What the access log says about a request."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate

from matrixinfer.access.callers import Caller
from matrixinfer.access.gate import CLIENT_GONE
from matrixinfer.gateway.answer import Exchange
from matrixinfer.routing.in_flight import InFlight
from matrixinfer.telemetry.access_entry import HASH_MASK, AccessEntry, Outcome
from matrixinfer.telemetry.access_log import AccessLog

_MULTIPLIER = 0x9E3779B97F4A7C15


class RequestLog:
    """Makes the entries of an access log. `is_chained`: whether a block's hash stands for all before it, too."""

    def __init__(self, sink: AccessLog, *, is_chained: bool) -> None:
        self._sink = sink
        self._is_chained = is_chained

    def ended(
        self,
        *,
        identity: str,
        path: str,
        session: str | None,
        code: int,
        error: str | None,
        started: float,
        body_read: float | None,
        exchange: Exchange | None,
        caller: Caller | None = None,
        trace: str | None = None,
    ) -> None:
        """A request is over. Times are seconds on the monotonic clock; `error` is why the gateway refused it."""
        sink = self._sink
        outcome = outcome_of(code, error, exchange)
        is_sampled = sink.takes(identity if session is None else session)
        if outcome == "answered" and not is_sampled:
            return
        now = time.monotonic()
        entry = AccessEntry(
            at=round(time.time() - (now - started), 3),
            id=identity,
            path=path,
            outcome=outcome,
            status=code,
            error=error,
            trace=trace,
            tenant=None if caller is None else caller.tenant,
            caller=None if caller is None else caller.name,
            session=None if session is None else sink.name_of(session),
            sampled=is_sampled,
        )
        if body_read is not None:
            entry.ms["body"] = _ms(body_read - started)
        if exchange is not None:
            self._add_dispatched(entry, exchange)
        entry.ms["total"] = _ms(now - started)
        sink.add(entry)

    def _add_dispatched(self, entry: AccessEntry, exchange: Exchange) -> None:
        """What is known of a request that was sent to a pod."""
        in_flight = exchange.in_flight
        record, request = in_flight.record, in_flight.request
        entry.model, entry.pod = request.model, in_flight.pod.name
        entry.tried = record.attempts[:-1]
        entry.degraded = {reason.value: why for reason, why in in_flight.prepared.degraded.items()}
        entry.ms.update((step, round(ms, 3)) for step, ms in record.timings_ms.items())
        if exchange.first_byte_at is not None:
            entry.ms["first_byte"] = _ms(exchange.first_byte_at - exchange.started)
        entry.prompt_tokens = request.prompt_tokens if record.counted is None else record.counted
        entry.cached_tokens = record.cached
        entry.predicted_hit_tokens = predicted_hit(in_flight)
        entry.output_tokens = exchange.output_tokens
        entry.stream_events = exchange.stream_events or None
        if in_flight.computed and self._sink.config.blocks and request.chain:
            entry.block_size = request.block_size
            entry.blocks = self._hashes(request.chain[: self._sink.config.max_blocks])

    def _hashes(self, chain: Sequence[int]) -> list[int]:
        if self._is_chained:
            return [each & HASH_MASK for each in chain]
        return list(accumulate(chain, lambda before, each: (before * _MULTIPLIER + each) & HASH_MASK, initial=0))[1:]


def outcome_of(code: int, error: str | None, exchange: Exchange | None) -> Outcome:
    """How a request ended. `error` is why the gateway refused it."""
    if code == CLIENT_GONE:
        return "client_left"
    if error is not None and exchange is not None and exchange.has_begun:
        return "broken_off"
    return "refused" if code >= 400 else "answered"


def predicted_hit(in_flight: InFlight) -> int | None:
    """The hit predicted where the request was computed; None if token ids or matches were not there to predict one."""
    late, asked, pod = in_flight.record.late, in_flight.decision.request, in_flight.pod
    if late is not None:
        return late["predicted_hit_tokens"]
    if asked.prompt_tokens is None:
        return None
    hit = pod.predicted_hit(asked.prompt_tokens, asked.block_size)
    return None if pod.matched_blocks is None and not hit else hit


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
