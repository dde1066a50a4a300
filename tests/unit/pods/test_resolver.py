from __future__ import annotations

import asyncio
import socket

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from matrixinfer.pods import resolver
from matrixinfer.pods.resolver import Resolver


class Names(AbstractResolver):
    """Gives the address, raises the error, or says nothing."""

    def __init__(self) -> None:
        self.address = "10.0.0.1"
        self.error: OSError | None = None
        self.is_silent = False

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        if self.is_silent:
            await asyncio.sleep(3600)
        if self.error is not None:
            raise self.error
        return [ResolveResult(hostname=host, host=self.address, port=port, family=family, proto=0, flags=0)]

    async def close(self) -> None: ...


async def address(resolves: Resolver, host: str = "pod") -> str:
    (found,) = await resolves.resolve(host, 80)
    return found["host"]


async def test_a_new_answer_replaces_an_old_one() -> None:
    names = Names()
    resolves = Resolver(names)
    assert await address(resolves) == "10.0.0.1"
    names.address = "10.0.0.2"
    assert await address(resolves) == "10.0.0.2"


async def test_a_name_server_that_fails_leaves_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "PATIENCE_SECONDS", 0.01)
    names = Names()
    resolves = Resolver(names)
    await address(resolves)
    names.error = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    assert await address(resolves) == "10.0.0.1"
    names.is_silent = True
    assert await address(resolves) == "10.0.0.1"
    names.is_silent = False
    with pytest.raises(socket.gaierror):
        await address(resolves, "another")


async def test_a_name_that_no_longer_exists_is_forgotten() -> None:
    names = Names()
    resolves = Resolver(names)
    await address(resolves)
    for number in (socket.EAI_NONAME, socket.EAI_AGAIN):
        names.error = socket.gaierror(number, "")
        with pytest.raises(socket.gaierror):
            await address(resolves)


async def test_what_is_known_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "_MOST_NAMES", 10)
    names = Names()
    resolves = Resolver(names)
    for number in range(20):
        await address(resolves, f"pod-{number}")
    names.error = socket.gaierror(socket.EAI_AGAIN, "")
    assert await address(resolves, "pod-19") == "10.0.0.1"
    with pytest.raises(socket.gaierror):
        await address(resolves, "pod-9")
