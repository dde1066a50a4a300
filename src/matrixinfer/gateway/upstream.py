"""Sends a request to a pod and waits for the headers of the answer. When that fails, it says how far the request got.

An engine closes idle connections, and may do so just while a request is being sent on one. That says nothing about the
engine, so the request is sent to it once more, on a new connection. Whether a connection was new is known, not guessed.
When a new one breaks after the request went out, the request itself may have broken the engine, so whoever sends it to
another pod must know: `AttemptFailed.was_sent`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from multidict import CIMultiDict

from matrixinfer.config import LimitsConfig
from matrixinfer.gateway.pod_connection import AttemptFailed, PodAnswer
from matrixinfer.gateway.pod_pool import Origin, PodPool, TrustAt, origin_of, system_trust
from matrixinfer.telemetry.metrics import Metrics

MAX_WHOLE_BYTES = 1024 * 1024
"""Answers up to this size are passed on at once, longer ones piece by piece."""

_WITHOUT_BODY = ("GET", "DELETE")
"""Methods whose requests have no body as a rule (RFC 9110, 9.3)."""


class Upstream:
    """Sends requests to pods, on connections that are kept."""

    def __init__(self, pool: PodPool, limits: LimitsConfig, metrics: Metrics) -> None:
        self._pool = pool
        self._silence = limits.first_byte_timeout_seconds
        self._metrics = metrics

    def reconfigure(self, limits: LimitsConfig) -> None:
        """Keep these limits from the next request on."""
        self._silence = limits.first_byte_timeout_seconds
        self._pool.connect_seconds = limits.connect_timeout_seconds

    async def send(
        self, method: str, url: str, target: str, body: bytes, headers: CIMultiDict[str], *, once: bool = False
    ) -> PodAnswer:
        """The answer of the pod at `url`, whose headers have come; `target` is a path with its query.

        With `once` the pod gets the request once, on a new connection: it may be one that breaks engines.

        Raises `AttemptFailed`, and `Overloaded` when this process is short of something.
        """
        origin = origin_of(url)
        head = _head(method, origin, target, headers, len(body))
        connection = None if once else self._pool.reuse(origin)
        if connection is not None:
            try:
                return await connection.send(head, body, silence=self._silence)
            except AttemptFailed as error:
                if error.kind != "disconnect":
                    raise
            self._metrics.retry("stale_connection")
        try:
            fresh = await self._pool.connect(origin)
            return await fresh.send(head, body, silence=self._silence)
        except AttemptFailed as error:
            if connection is None:
                raise
            # Perhaps the first connection broke because the request broke the engine.
            raise AttemptFailed(error.kind, was_sent=True) from error

    def forget(self, url: str) -> None:
        """A pod has gone: close the idle connections to it."""
        self._pool.forget(origin_of(url))


@contextmanager
def upstream(
    limits: LimitsConfig,
    metrics: Metrics,
    on_shortage: Callable[[str, str], None] = lambda _place, _what: None,
    trust_at: TrustAt | None = None,
) -> Iterator[Upstream]:
    """Keep connections to the pods. `on_shortage` is called when this process cannot connect, whatever the pod.

    `trust_at` says how to reach the pod at a host and port by TLS.
    """
    pool = PodPool(limits.connect_timeout_seconds, on_shortage, trust_at or system_trust)
    try:
        yield Upstream(pool, limits, metrics)
    finally:
        pool.close()


def _head(method: str, origin: Origin, target: str, headers: CIMultiDict[str], length: int) -> bytes:
    """The head of a request. Raises `ValueError` if a header would add a line to it."""
    lines = [f"{method} {origin.prefix}{target} HTTP/1.1", f"host: {origin.authority}"]
    lines += map(": ".join, headers.items())
    if length or method not in _WITHOUT_BODY:
        lines.append(f"content-length: {length}")
    lines += ["", ""]
    head = "\r\n".join(lines)
    if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1 or "\0" in head:
        raise ValueError("a header contains the end of a line")
    return head.encode("utf-8", "surrogateescape")
