from __future__ import annotations

import asyncio

import pytest

from matrixinfer.gateway.deadlines import Deadlines

LONG, SHORT = 600.0, 0.02


async def test_a_context_that_takes_too_long_ends_with_a_timeout_and_its_task_goes_on() -> None:
    deadline = Deadlines(SHORT).begin()
    with pytest.raises(TimeoutError), deadline:
        await asyncio.sleep(LONG)
    assert deadline.has_passed
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()
    await asyncio.sleep(0)  # nothing is left that would cancel it now


async def test_a_context_that_ends_in_time_is_forgotten() -> None:
    deadlines = Deadlines(SHORT)
    deadline = deadlines.begin()
    with deadline:
        await asyncio.sleep(0)
    await asyncio.sleep(3 * SHORT)
    assert not deadline.has_passed


async def test_each_of_many_passes_in_its_own_time_although_there_is_one_timer() -> None:
    deadlines = Deadlines(5 * SHORT)
    loop = asyncio.get_running_loop()
    took: list[float] = []

    async def late(after: float) -> None:
        await asyncio.sleep(after)
        began = loop.time()
        with pytest.raises(TimeoutError), deadlines.begin():
            await asyncio.sleep(LONG)
        took.append(loop.time() - began)

    async def in_time() -> None:
        with deadlines.begin():
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        group.create_task(in_time())  # the timer is set for this one
        for i in range(8):
            group.create_task(late(i * SHORT))
    assert len(took) == 8
    assert min(took) >= 5 * SHORT - 0.001


async def test_deadlines_pass_again_after_all_have_ended() -> None:
    deadlines = Deadlines(SHORT)
    for _ in range(3):
        with pytest.raises(TimeoutError), deadlines.begin():
            await asyncio.sleep(LONG)
        await asyncio.sleep(2 * SHORT)


async def test_an_error_of_the_context_passes_on_as_it_is() -> None:
    deadline = Deadlines(LONG).begin()
    with pytest.raises(TimeoutError, match="another one"), deadline:
        raise TimeoutError("another one")
    assert not deadline.has_passed


async def test_a_task_that_is_cancelled_in_the_context_is_cancelled_also_if_the_deadline_passes_with_it() -> None:
    deadline = Deadlines(LONG).begin()

    async def work() -> None:
        with deadline:
            await asyncio.sleep(LONG)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    deadline.pass_now()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_deadline_within_another_one_ends_only_its_own_context() -> None:
    outer = Deadlines(LONG).begin()
    with outer:
        with pytest.raises(TimeoutError), Deadlines(SHORT).begin():
            await asyncio.sleep(LONG)
        await asyncio.sleep(0)
    assert not outer.has_passed
