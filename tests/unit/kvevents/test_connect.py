"""What a host's addresses make of the socket that connects to it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from matrixinfer.kvevents import connect as module
from matrixinfer.kvevents.connect import Unresolved, connect, subscribe

V4, V6 = socket.AF_INET, socket.AF_INET6


@pytest.fixture
def peer() -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, subscribe(context) as peer:
        peer.setsockopt(zmq.LINGER, 0)
        yield peer


class Names:
    """The results of consecutive lookups; the last one repeats."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *found: list[int] | Exception | None) -> None:
        self.asked: list[str] = []
        self._found = list(found)
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", self._resolve)

    async def _resolve(self, host: str, *_: Any, **__: Any) -> list[tuple[Any, ...]]:
        self.asked.append(host)
        found = self._found.pop(0) if len(self._found) > 1 else self._found[0]
        if found is None:
            await asyncio.sleep(60)
        if isinstance(found, Exception):
            raise found
        return [(family, socket.SOCK_STREAM, 6, "", ()) for family in found or ()]


@pytest.mark.parametrize(("families", "ipv6"), [([V4], 0), ([V6, V4], 0), ([V6], 1)])
async def test_ipv6_is_allowed_only_where_a_name_has_nothing_else(
    peer: zmq.Socket[bytes], monkeypatch: pytest.MonkeyPatch, families: list[int], ipv6: int
) -> None:
    names = Names(monkeypatch, families)
    await connect(peer, "tcp://localhost:1")
    assert names.asked == ["localhost"]
    assert peer.getsockopt(zmq.IPV6) == ipv6
    peer.disconnect("tcp://localhost:1")  # raises where it was not connected


@pytest.mark.parametrize("found", [socket.gaierror(-2, "unknown"), UnicodeError("label too long"), None])
async def test_what_does_not_resolve_is_not_connected(
    peer: zmq.Socket[bytes], monkeypatch: pytest.MonkeyPatch, found: Exception | None
) -> None:
    monkeypatch.setattr(module, "LOOKUP_TIMEOUT", 0.01)
    Names(monkeypatch, found, [V4])
    with pytest.raises(Unresolved, match="the name `localhost` does not resolve"):
        await connect(peer, "tcp://localhost:1")
    with pytest.raises(zmq.ZMQError):
        peer.disconnect("tcp://localhost:1")
    await connect(peer, "tcp://localhost:1")
    assert peer.getsockopt(zmq.IPV6) == 0


@pytest.mark.parametrize(
    ("endpoint", "ipv6"),
    [
        ("tcp://127.0.0.1:1", 0),
        ("tcp://127.0.0.2:0;127.0.0.1:1", 0),
        ("tcp://[::1]:1", 1),
        ("tcp://::1:1", 1),
        ("tcp://[fe80::1%lo]:1", 1),
        ("ipc://x:1", 0),
    ],
)
async def test_addresses_are_not_looked_up(
    peer: zmq.Socket[bytes], monkeypatch: pytest.MonkeyPatch, endpoint: str, ipv6: int
) -> None:
    names = Names(monkeypatch, None)
    await connect(peer, endpoint)
    assert names.asked == []
    assert peer.getsockopt(zmq.IPV6) == ipv6


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1", "udp://127.0.0.1:1", "127.0.0.1:1", ""])
async def test_what_is_no_endpoint_is_refused(peer: zmq.Socket[bytes], endpoint: str) -> None:
    with pytest.raises(zmq.ZMQError) as refused:
        await connect(peer, endpoint)
    assert not isinstance(refused.value, Unresolved)
