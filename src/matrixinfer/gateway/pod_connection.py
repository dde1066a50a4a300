"""One connection to a pod, HTTP/1.1 on httptools' parser, which also guards the framing of what engines send.

A general client library does as much again for every request as the rest of the gateway does: it prepares for
redirects, cookies, decompression and tracing. This sends a request whose head is ready, and passes on the bytes of the
answer as they come.

    send ─> PodAnswer (its headers have come) ─> read, or readany until it returns nothing

Everything is bounded: the head in bytes and fields, the body that waits to be read, and every silence. Errors are
`AttemptFailed`, whose `kind` says what happened.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, Literal, TypeAlias, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser
from multidict import CIMultiDict

from matrixinfer.errors import MatrixInferError

MAX_HEAD_BYTES: Final = 64 * 1024
"""Bytes of an answer's head; and of anything else, such as the extensions of a chunk, that comes between two pieces of its body."""
MAX_HEADERS: Final = 128
_MAX_WAITING_BYTES = 256 * 1024
"""Bytes of a body that wait to be read; the pod is read no further beyond them."""
_PIECE_BYTES = 64 * 1024
"""Longer bodies are sent in pieces of this size, each when the pod has taken those before."""
_AT_ONCE_BYTES = 256 * 1024
_COPIED_BYTES = 16 * 1024
"""Up to this size, a copy behind its head costs less than a second buffer."""
_FIRST_FINAL_STATUS = 200

FailureKind: TypeAlias = Literal["connect", "connect_timeout", "disconnect", "protocol", "timeout", "went_down"]


class AttemptFailed(MatrixInferError):
    """The pod sent no answer, or not all of it. `was_sent`: it may have read the request."""

    def __init__(self, kind: FailureKind, *, was_sent: bool) -> None:
        super().__init__(kind)
        self.kind = kind
        self.was_sent = was_sent


class PodAnswer:
    """An answer whose headers have come."""

    __slots__ = ("_connection", "content_length", "headers", "reason", "status")

    def __init__(
        self,
        connection: PodConnection,
        status: int,
        reason: str,
        headers: CIMultiDict[str],
        content_length: int | None,
    ) -> None:
        self._connection = connection
        self.status = status
        self.reason = reason
        self.headers = headers
        self.content_length = content_length
        """Bytes of the body; None when that is not known beforehand."""

    @property
    def content_type(self) -> str:
        """The media type, without its parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def readany(self) -> bytes:
        """The bytes of the body that have come, at least one; nothing at its end. Raises `AttemptFailed`."""
        return await self._connection.read_some(self)

    async def read(self) -> bytes:
        """The whole body. Raises `AttemptFailed`."""
        connection, pieces = self._connection, []
        while piece := await connection.read_some(self):
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def limit_silence(self, seconds: float) -> None:
        """Fail with `timeout` when the pod sends nothing for so long, from now on."""
        self._connection.limit_silence(self, seconds)

    def close(self) -> None:
        """Close the connection, unless the whole answer has come: then it may serve another request by now."""
        self._connection.abandon(self)


class PodConnection(asyncio.Protocol):
    """Serves one request at a time. `idle` is called when it can serve another one."""

    def __init__(self, loop: asyncio.AbstractEventLoop, idle: Callable[[PodConnection], None]) -> None:
        self.served = 0
        """Requests sent on it, this one included."""
        self.is_open = False
        self._loop = loop
        self._idle = idle
        self._transport: asyncio.Transport | None = None
        self._parser: HttpResponseParser | None = HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(lenient_optional_cr_before_lf=True)  # as RFC 9112, 2.2 allows
        self._waiter: asyncio.Future[None] | None = None
        self._failure: AttemptFailed | None = None
        self._answer: PodAnswer | None = None
        self._awaits = False
        """A request was sent, and its answer is not complete."""
        self._is_sent = True
        self._is_complete = False
        self._is_interim = False
        self._is_reusable = False
        self._ends_with_connection = False
        self._reason: list[bytes] = []
        self._fields: list[tuple[bytes, bytes]] = []
        self._overhead = 0
        """Bytes that have come since the last piece of a body."""
        self._pieces: list[bytes] = []
        self._waiting_bytes = 0
        self._is_paused = False
        self._can_write = True
        self._silence = 0.0
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def send(self, head: bytes, body: bytes, *, silence: float) -> PodAnswer:
        """Send a request and wait for the headers of its answer, at most `silence` seconds after any sign of the pod.

        Raises `AttemptFailed`.
        """
        self.served += 1
        self._begin(silence)
        try:
            if len(body) <= _COPIED_BYTES:
                self._write((head + body,))
            elif len(body) <= _AT_ONCE_BYTES:
                self._write((head, body))
            else:
                await self._send_pieces(head, body)
            return await self._head()
        except BaseException:
            self._close()
            raise

    async def read_some(self, answer: PodAnswer) -> bytes:
        while self._answer is answer:
            if self._pieces:
                return self._take()
            if self._failure is not None:
                raise self._failure
            if self._is_complete:
                self._release()
                break
            await self._wait()
        return b""

    def limit_silence(self, answer: PodAnswer, seconds: float) -> None:
        if self._answer is answer and not self._is_complete:
            self._silence = seconds
            if not self._is_paused:
                self._expect()

    def abandon(self, answer: PodAnswer) -> None:
        if self._answer is not answer:
            return
        if self._is_complete:
            self._release()
        else:
            self._close()

    def close(self) -> None:
        """Close an idle connection."""
        self._close()

    # The transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        if not self._awaits or self._parser is None:
            self._close()  # nobody asked
            return
        if self._deadline is not None:
            self._deadline = self._loop.time() + self._silence
        self._overhead += len(data)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade):
            if not self._is_complete:
                self._fail("protocol")
                return
            self._is_reusable = False  # it came after the answer
        if self._overhead > MAX_HEAD_BYTES:
            self._fail("protocol")
        elif self._is_complete:
            self._finish()
        elif self._waiting_bytes > _MAX_WAITING_BYTES:
            self._pause()

    def eof_received(self) -> None:
        """The pod sends nothing more; the transport closes itself."""

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._transport = None
        self._parser = None  # they hold each other
        self._stop_timer()
        if self._awaits and not self._is_complete:
            if self._ends_with_connection and error is None:
                self._is_complete = True
                self._finish()
            else:
                self._fail("disconnect")

    def pause_writing(self) -> None:
        """The pod takes no more for now."""
        self._can_write = False

    def resume_writing(self) -> None:
        """The pod takes more."""
        self._can_write = True
        self._wake()

    # The parser

    def on_message_begin(self) -> None:
        """An answer begins, or an interim one."""
        if self._is_complete:
            self._is_reusable = False
            return
        self._fields.clear()
        self._reason.clear()

    def on_status(self, reason: bytes) -> None:
        self._reason.append(reason)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer."""
        if self._answer is None and not self._is_complete:
            self._fields.append((name, value))
            if len(self._fields) > MAX_HEADERS:
                raise ValueError("too many headers")

    def on_headers_complete(self) -> None:
        if self._is_complete or self._parser is None:
            return
        status = self._parser.get_status_code()
        self._is_interim = status < _FIRST_FINAL_STATUS
        if self._is_interim:
            if status == 101:  # the engine now speaks another protocol, which nobody asked for
                raise ValueError("unexpected protocol")
            return
        headers = _headers(self._fields)
        has_body = status not in (204, 304)
        is_chunked = "transfer-encoding" in headers
        length = None if is_chunked else headers.get("content-length")
        self._ends_with_connection = has_body and length is None and not _is_last_chunked(headers)
        self._answer = PodAnswer(
            self,
            status,
            b"".join(self._reason).decode("utf-8", "surrogateescape"),
            headers,
            (int(length) if length is not None else None) if has_body else 0,
        )
        self._overhead = 0
        self._wake()

    def on_body(self, piece: bytes) -> None:
        if self._is_complete:
            return
        if self._answer is None:
            raise ValueError("an interim answer with a body")
        self._pieces.append(piece)
        self._waiting_bytes += len(piece)
        self._overhead = 0
        self._wake()

    def on_message_complete(self) -> None:
        """The answer is complete, unless it was an interim one."""
        if not self._is_interim and not self._is_complete and self._parser is not None:
            self._is_complete = True
            self._is_reusable = self._parser.should_keep_alive()

    # Inside

    def _begin(self, silence: float) -> None:
        self._awaits = True
        self._is_sent = True
        self._answer = None
        self._is_complete = self._is_interim = self._is_reusable = self._ends_with_connection = False
        self._overhead = 0
        self._silence = silence
        self._expect()

    def _write(self, parts: Sequence[bytes | memoryview]) -> None:
        if self._transport is None:
            return
        if len(parts) == 1:
            self._transport.write(parts[0])
        else:
            self._transport.writelines(parts)

    async def _head(self) -> PodAnswer:
        while self._answer is None:
            if self._failure is not None:
                raise self._failure
            if self._transport is None:  # closed before the request was sent
                raise AttemptFailed("disconnect", was_sent=True)
            await self._wait()
        return self._answer

    async def _send_pieces(self, head: bytes, body: bytes) -> None:
        """Send a long body, unless the pod answers before it has taken all of it."""
        self._is_sent = False
        self._write((head,))
        with memoryview(body) as view:
            for start in range(0, len(body), _PIECE_BYTES):
                self._write((view[start : start + _PIECE_BYTES],))
                await asyncio.sleep(0)  # an answer is read before the next piece can fail
                while not self._can_write and self._answer is None and self._failure is None:
                    await self._wait()
                if self._answer is not None or self._failure is not None:
                    return
                self._expect()
        self._is_sent = True

    async def _wait(self) -> None:
        self._waiter = waiter = self._loop.create_future()
        try:
            await waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _take(self) -> bytes:
        pieces = self._pieces
        taken = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._waiting_bytes = 0
        if self._is_paused:
            self._is_paused = False
            self._expect()
            if self._transport is not None:
                self._transport.resume_reading()
        return taken

    def _pause(self) -> None:
        """Read no further. It is not the pod that is silent now."""
        if not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._deadline = None
            self._transport.pause_reading()

    def _finish(self) -> None:
        """The answer has come to its end: nothing more is expected on this connection."""
        self._deadline = None
        if not (self._is_reusable and self._is_sent):
            self._close()
        self._wake()

    def _release(self) -> None:
        """The answer is read, or nobody wants the rest: the next request may come."""
        self._answer = None
        self._pieces.clear()
        self._waiting_bytes = 0
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()
        self._awaits = False
        if self.is_open:
            self._idle(self)

    def _fail(self, kind: FailureKind) -> None:
        if self._failure is None:
            self._failure = AttemptFailed(kind, was_sent=True)
        self._deadline = None
        self._close()
        self._wake()

    def _close(self) -> None:
        self.is_open = False
        self._stop_timer()
        if self._transport is not None:
            self._transport.abort()

    # Silence

    def _expect(self) -> None:
        """From now on, the pod may be silent for `_silence` seconds. One timer serves for many requests: it is late only."""
        if not self.is_open:
            return
        deadline = self._deadline = self._loop.time() + self._silence
        timer = self._timer
        if timer is None or timer.when() > deadline:
            if timer is not None:
                timer.cancel()
            self._timer = self._loop.call_at(deadline, self._check_silence)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check_silence(self) -> None:
        self._timer = None
        if self._deadline is None:
            return
        if self._loop.time() >= self._deadline:
            self._fail("timeout")
        else:
            self._timer = self._loop.call_at(self._deadline, self._check_silence)


def _headers(fields: Sequence[tuple[bytes, bytes]]) -> CIMultiDict[str]:
    return CIMultiDict(
        [(name.decode("latin-1"), value.decode("utf-8", "surrogateescape").strip(" \t")) for name, value in fields]
    )


def _is_last_chunked(headers: CIMultiDict[str]) -> bool:
    encodings = ",".join(headers.getall("transfer-encoding", ()))
    return encodings.rpartition(",")[2].strip().lower() == "chunked"
