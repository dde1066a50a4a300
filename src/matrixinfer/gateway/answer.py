"""A client's request on its way, and the answer to it: what of that is changed before the client gets it."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.http import HttpVersion11

from matrixinfer.access.demand import Used
from matrixinfer.access.gate import Ticket
from matrixinfer.gateway import usage
from matrixinfer.gateway.model_names import Renamer
from matrixinfer.gateway.pod_connection import PodAnswer
from matrixinfer.gateway.response_ids import ResponseId
from matrixinfer.gateway.rewrite import PodBody
from matrixinfer.gateway.usage import UsageStripper
from matrixinfer.prompt.memory import Held
from matrixinfer.routing.in_flight import InFlight

if TYPE_CHECKING:
    from matrixinfer.gateway.request_trace import RequestTrace  # needs an extra

JSON, EVENTS = "application/json", "text/event-stream"


@dataclass(slots=True, kw_only=True)
class Exchange:
    """A client's request and where it was dispatched to."""

    request: web.BaseRequest
    id: str
    started: float
    """Seconds on the monotonic clock."""
    in_flight: InFlight
    ticket: Ticket | None = None
    """What the request was promised; None where everybody may send anything."""
    has_begun: bool = False
    """Whether the client has got the first byte of a streamed answer."""
    first_byte_at: float | None = None
    """When the first byte of the answer came."""
    output_tokens: int | None = None
    """Tokens of the answer, if it reports them."""
    counts_events: bool = False
    """Whether somebody wants to know `stream_events`."""
    stream_events: int = 0
    """Server-sent events of the answer."""
    response_id: ResponseId | None = None
    """Learns which pod stores the response that the answer is, where engines store them."""
    trace: RequestTrace | None = None
    """None where requests are not traced."""
    held: Held | None = None
    """The memory that its body takes."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A pod's answer, whose headers have come."""

    exchange: Exchange
    upstream: PodAnswer
    sent: PodBody

    @property
    def length(self) -> int | None:
        """Bytes of the body as the client gets it; None when that is not known beforehand."""
        return None if self.is_stripped or self.is_renamed else self.upstream.content_length

    @property
    def is_events(self) -> bool:
        """Whether it is a stream of events in plain text."""
        return self._is_plain and self.upstream.content_type == EVENTS

    @property
    def is_stripped(self) -> bool:
        """Whether the usage report that the gateway asked for is taken out of the stream."""
        return self.sent.adds_usage and self.is_events

    @property
    def is_renamed(self) -> bool:
        """Whether the model gets back the name by which the client asked for it."""
        return self.sent.renamed is not None and self._is_plain and self.upstream.content_type in (JSON, EVENTS)

    @property
    def renamer(self) -> Renamer | None:
        """Gives the model its name back."""
        return Renamer(*self.sent.renamed) if self.sent.renamed is not None and self.is_renamed else None

    @property
    def may_report(self) -> bool:
        """Whether the answer may report how many prompt tokens there were, and somebody wants to know."""
        if not self._is_plain:
            return False
        ticket = self.exchange.ticket
        return self.exchange.in_flight.wants_usage or (ticket is not None and ticket.wants_usage)

    @property
    def _is_plain(self) -> bool:
        return self.upstream.status == 200 and "Content-Encoding" not in self.upstream.headers


class Passage:
    """What happens to an answer on its way to the client: it is read for what it reports, and changed."""

    __slots__ = ("_changes", "_exchange", "_is_whole", "_response_id", "_tail")

    def __init__(self, answer: Answer, *, is_whole: bool) -> None:
        self._exchange = answer.exchange
        self._is_whole = is_whole
        self._response_id = answer.exchange.response_id if answer.upstream.status == 200 else None
        self._tail = usage.Tail() if answer.may_report else None
        stripper, renamer = UsageStripper() if answer.is_stripped else None, answer.renamer
        self._changes = [change for change in (stripper, renamer) if change is not None]

    def change(self, chunk: bytes) -> bytes:
        """What the client gets of these bytes so far."""
        if self._exchange.counts_events and not self._is_whole:
            self._exchange.stream_events += chunk.count(b"data:")
        if self._tail is not None:
            self._tail.add(chunk)
        if self._response_id is not None:
            self._response_id.add(chunk, self._exchange.in_flight.pod.pod)
        for change in self._changes:
            chunk = change.change(chunk)
        return chunk

    def end(self) -> bytes:
        """The answer is complete: report its usage, and return what is left of it."""
        if self._tail is not None:
            count(self._exchange, bytes(self._tail))
        rest = b""
        for change in self._changes:
            rest = (change.change(rest) if rest else b"") + change.rest()
        return rest


def count(exchange: Exchange, answer: bytes) -> None:
    """Pass on the usage that an answer reports at its end, if it does."""
    counted = usage.usage(answer)
    if counted is None:
        return
    exchange.output_tokens = counted.output
    if exchange.in_flight.wants_usage:
        exchange.in_flight.usage(counted.prompt, counted.cached)
    if exchange.ticket is not None:
        exchange.ticket.used(Used(counted.prompt, counted.cached, counted.output))


def cut(request: web.BaseRequest) -> None:
    """Close a client's connection so that what it received cannot pass for a complete answer."""
    transport = request.transport
    if transport is None:
        return
    if request.version < HttpVersion11:
        # The end of the connection would mark the end of the answer: reset it instead.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    elif request.protocol.writing_paused:
        transport.abort()
    else:
        transport.close()
