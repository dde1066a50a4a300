"""Receiving from many sockets within one slice of each turn of the loop."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import zmq

from matrixinfer.kvevents.drain import SLICE_SECONDS, Drain
from tests.waiting import DEADLINE_SECONDS, eventually

MESSAGES = 20


Socket = zmq.Socket[bytes]
FullSocket = Callable[[], Socket]


@pytest.fixture
def full_socket() -> Iterator[FullSocket]:
    """Makes sockets with messages to read, each of which is the socket's name."""
    context: zmq.Context[Socket] = zmq.Context()
    sockets: list[Socket] = []

    def make() -> Socket:
        name = f"inproc://{len(sockets)}"
        reader, writer = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        sockets.extend((reader, writer))
        reader.bind(name)
        writer.connect(name)
        for _ in range(MESSAGES):
            writer.send(name.encode())
        return reader

    yield make
    for socket in sockets:
        socket.close(linger=0)
    context.term()


async def test_busy_sockets_share_one_slice_of_a_turn_and_take_turns(full_socket: FullSocket) -> None:
    drain, seen = Drain(), Counter[bytes]()
    most = spread = 0

    def work(parts: list[bytes]) -> None:
        seen[parts[0]] += 1
        time.sleep(SLICE_SECONDS / 4)

    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(drain.reading(full_socket(), work))
        async with asyncio.timeout(DEADLINE_SECONDS):
            while seen.total() < 8 * MESSAGES:
                before = seen.total()
                await asyncio.sleep(0)
                most = max(most, seen.total() - before)
                if len(seen) == 8:
                    spread = max(spread, max(seen.values()) - min(seen.values()))
    assert most <= 4
    assert spread <= 1


async def test_a_fault_over_one_message_leaves_no_socket_unread(full_socket: FullSocket) -> None:
    drain, seen = Drain(), Counter[bytes]()
    faults: list[dict[str, Any]] = []

    def work(parts: list[bytes]) -> None:
        seen[parts[0]] += 1
        if seen.total() == 3:
            raise ZeroDivisionError

    asyncio.get_running_loop().set_exception_handler(lambda _, fault: faults.append(fault))
    with drain.reading(full_socket(), work), drain.reading(full_socket(), work):
        await eventually(lambda: seen.total() >= 2 * MESSAGES, pause=0)
    assert len(faults) == 1


async def test_nothing_is_read_after_the_context(full_socket: FullSocket) -> None:
    drain, seen = Drain(), Counter[bytes]()
    with drain.reading(full_socket(), seen.update):
        pass
    await asyncio.sleep(0.01)
    assert not seen


async def test_what_a_message_leaves_to_do_is_done_before_the_next_one_and_holds_up_no_other_socket(
    full_socket: FullSocket,
) -> None:
    drain, seen = Drain(), list[str]()

    def slowly(_: list[bytes]) -> Iterator[None]:
        seen.append("begun")
        for _step in range(8):
            time.sleep(SLICE_SECONDS / 2)
            yield
        seen.append("done")

    def quickly(_: list[bytes]) -> None:
        seen.append("other")

    with drain.reading(full_socket(), slowly), drain.reading(full_socket(), quickly):
        await eventually(lambda: seen.count("done") >= 3, pause=0)
    long_ones = [each for each in seen if each != "other"]
    assert long_ones[:6] == ["begun", "done"] * 3
    between = seen[seen.index("begun") : seen.index("done")]
    assert between.count("other") >= 2


async def test_what_a_message_leaves_to_do_is_not_done_after_the_context(full_socket: FullSocket) -> None:
    drain, steps = Drain(), 0

    def endlessly(_: list[bytes]) -> Iterator[None]:
        nonlocal steps
        while True:
            time.sleep(SLICE_SECONDS)
            steps += 1
            yield

    with drain.reading(full_socket(), endlessly):
        await eventually(lambda: steps >= 2, pause=0)
    before = steps
    await asyncio.sleep(0.01)
    assert steps == before
