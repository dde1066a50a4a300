"""Comments come between events only, and only while the engine is silent. In virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from matrixinfer.gateway.keep_alive import COMMENT, KeepAlive
from tests.virtual_time import VirtualTimeLoop


async def passed_on(script: Sequence[tuple[float, bytes]], *, seconds: float = 10.0) -> bytes:
    """What a client gets of chunks that come after these pauses."""
    coming: asyncio.Queue[bytes] = asyncio.Queue()
    out: list[bytes] = []

    async def engine() -> None:
        for pause, chunk in script:
            await asyncio.sleep(pause)
            coming.put_nowait(chunk)
        coming.put_nowait(b"")

    async def send(data: bytes) -> None:
        out.append(data)

    keep_alive = KeepAlive(seconds, coming.get, send)
    async with asyncio.TaskGroup() as group:
        group.create_task(engine())
        while chunk := await keep_alive.read():
            out.append(chunk)
            keep_alive.passed(chunk)
    return b"".join(out)


def virtually(script: Sequence[tuple[float, bytes]]) -> bytes:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(passed_on(script))


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_silence_between_events_is_filled(end: bytes) -> None:
    event = b"data: 1" + end
    assert virtually([(0, event), (25, event), (5, event)]) == event + COMMENT * 2 + event * 2


@pytest.mark.parametrize("half", [b"data: 1", b"data: 1\n", b"data: 1\r\n", b"data: 1\r\n\r", b"event: a\ndata: 1"])
def test_a_comment_never_splits_an_event(half: bytes) -> None:
    rest = b"\n\n"
    assert virtually([(0, half), (100, rest), (11, b"data: 2\n\n")]) == half + rest + COMMENT + b"data: 2\n\n"


def test_an_end_that_comes_in_two_pieces_is_an_end() -> None:
    assert virtually([(0, b"data: 1\n"), (1, b"\n"), (11, b"x\n\n")]) == b"data: 1\n\n" + COMMENT + b"x\n\n"


def test_a_stream_that_is_never_silent_has_no_comment() -> None:
    assert virtually([(9, b"data: 1\n\n")] * 5) == b"data: 1\n\n" * 5
