"""The channel between the processes of one machine, over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest

from matrixinfer.traffic.peers.local import Hub, LocalChannel
from matrixinfer.traffic.peers.message import MAX_BYTES
from tests.waiting import DEADLINE_SECONDS


@pytest.fixture
async def path(tmp_path: Path) -> AsyncIterator[Path]:
    async with Hub(tmp_path / "hub"):
        yield tmp_path / "hub"


async def test_a_message_reaches_all_who_listen_and_its_sender(path: Path) -> None:
    one, other = LocalChannel(path), LocalChannel(path)
    async with one.listen() as here, other.listen() as there:
        await one.ready()
        for message in (b"", b"x", b"y" * MAX_BYTES):
            await one.publish(message)
            assert await here(DEADLINE_SECONDS) == message
            assert await there(DEADLINE_SECONDS) == message
    one.close()


async def test_silence_is_no_message(path: Path) -> None:
    channel = LocalChannel(path)
    async with channel.listen() as receive:
        assert await receive(0.01) is None
        await channel.publish(b"late")
        assert await receive(DEADLINE_SECONDS) == b"late"
    channel.close()


async def test_a_message_too_long_ends_its_sender_alone(path: Path) -> None:
    bad, good = LocalChannel(path), LocalChannel(path)
    async with good.listen() as receive:
        with suppress(OSError):
            await bad.publish(b"z" * (MAX_BYTES + 1))
        await good.publish(b"fine")
        assert await receive(DEADLINE_SECONDS) == b"fine"
    bad.close()
    good.close()


async def test_a_listener_that_reads_nothing_holds_nobody_up(path: Path) -> None:
    channel = LocalChannel(path)
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"L")
    async with channel.listen() as receive:
        for i in range(30):
            await channel.publish(bytes([i]) * MAX_BYTES)
            assert await receive(DEADLINE_SECONDS) is not None
    channel.close()
    writer.close()
    assert reader is not None


async def test_a_hub_that_ends_is_noticed(tmp_path: Path) -> None:
    path, channel = tmp_path / "hub", LocalChannel(tmp_path / "hub")
    async with AsyncExitStack() as stack:
        async with Hub(path):
            receive = await stack.enter_async_context(channel.listen())
        with pytest.raises(OSError, match=r"gone|reset"):
            await receive(DEADLINE_SECONDS)
    path.unlink(missing_ok=True)
    with pytest.raises(OSError):  # noqa: PT011 - whatever the system says when nobody listens
        await channel.ready()
    channel.close()
