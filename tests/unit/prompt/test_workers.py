from __future__ import annotations

import asyncio
import gc
import threading
import time

import pytest

from matrixinfer.errors import Overloaded, TokenizeError
from matrixinfer.prompt import workers
from matrixinfer.prompt.effort import Abandoned, check
from matrixinfer.prompt.memory import Memory
from matrixinfer.prompt.workers import Lanes
from tests.waiting import eventually

MEGABYTE = 1024 * 1024


def until_stopped(running: threading.Event) -> None:
    running.set()
    while True:
        check()
        time.sleep(0.001)


async def test_work_ends_when_its_caller_is_cancelled() -> None:
    lanes, running = Lanes(limit=4, seconds=60), threading.Event()
    job = asyncio.create_task(lanes.tokenize(True, until_stopped, running))
    await asyncio.to_thread(running.wait, 10)
    assert len(lanes) == 1
    job.cancel()
    await eventually(lambda: len(lanes) == 0)
    assert job.cancelled()
    lanes.close()


async def test_work_ends_at_its_own_deadline() -> None:
    lanes = Lanes(limit=4, seconds=0.05)
    with pytest.raises(Abandoned, match=r"longer than 0\.05 s"):
        await lanes.tokenize(False, until_stopped, threading.Event())
    await eventually(lambda: len(lanes) == 0)
    lanes.close()


async def test_a_job_that_nobody_waits_for_counts_until_it_is_dropped() -> None:
    lanes, running = Lanes(limit=3, seconds=60), threading.Event()
    release = threading.Event()
    blocking = [asyncio.create_task(lanes.tokenize(True, release.wait, 60)) for _ in range(2)]
    waiting = asyncio.create_task(lanes.tokenize(True, until_stopped, running))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    with pytest.raises(TokenizeError, match="3 prompts are already waiting"):
        await lanes.tokenize(True, int)
    release.set()
    await asyncio.gather(*blocking)
    await eventually(lambda: len(lanes) == 0)
    assert not running.is_set()
    lanes.close()


async def test_short_prompts_and_bodies_do_not_wait_for_long_prompts() -> None:
    lanes, release = Lanes(limit=64, seconds=60), threading.Event()
    long = [asyncio.create_task(lanes.tokenize(True, release.wait, 60)) for _ in range(20)]
    await asyncio.sleep(0)
    assert await lanes.tokenize(False, int, "7") == 7
    assert await lanes.read(int, "8") == 8
    assert not any(each.done() for each in long)
    release.set()
    await asyncio.gather(*long)
    lanes.close()


async def test_bodies_that_wait_for_too_long_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_READ_SECONDS", 0.05)
    lanes = Lanes(limit=4, seconds=60)
    with pytest.raises(Overloaded, match="Too many large requests"):
        await lanes.read(until_stopped, threading.Event())
    monkeypatch.setattr(workers, "_MAX_READING", 0)
    with pytest.raises(Overloaded, match="Too many large requests"):
        await Lanes(limit=4, seconds=60).read(int)
    lanes.close()


def test_memory_is_taken_up_to_the_limit_and_given_back() -> None:
    memory = Memory(16 * MEGABYTE)
    with memory.hold() as held:
        assert held.take(memory.largest)
        assert not held.take(1)
        assert memory.used == held.bytes == 14 * MEGABYTE
        small = memory.hold()
        assert small.take(MEGABYTE)  # from the part that is kept free
        assert not small.take(1)
        assert not memory.hold().fits(1 + MEGABYTE)
        assert memory.hold().take(MEGABYTE)
    assert memory.used == MEGABYTE
    small.release()
    small.release()
    assert memory.used == 0


def test_what_is_dropped_gives_its_memory_back() -> None:
    memory = Memory(16 * MEGABYTE)
    held = memory.hold()
    assert held.take(100)
    del held
    assert memory.used == 0


def test_threads_can_take_and_give_at_once() -> None:
    memory = Memory(16 * MEGABYTE)

    def work() -> None:
        for _ in range(2000):
            with memory.hold() as held:
                held.take(3)
                held.take(5)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert memory.used == 0


async def test_how_work_ended_that_nobody_waits_for_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    lanes, running = Lanes(limit=4, seconds=60), threading.Event()
    job = asyncio.create_task(lanes.tokenize(True, until_stopped, running))
    await asyncio.to_thread(running.wait, 10)
    job.cancel()
    await eventually(lambda: len(lanes) == 0)
    del job
    gc.collect()
    assert "never retrieved" not in caplog.text
    lanes.close()
