from __future__ import annotations

import asyncio
import random
import time

from matrixinfer.telemetry.loop_watch import WINDOW_SECONDS, LoopWatch, Pauses
from matrixinfer.telemetry.metrics import Metrics


def test_the_longest_pause_is_that_of_the_last_minute() -> None:
    draw, pauses = random.Random(1), Pauses()
    seen: list[tuple[float, float]] = []
    now = 0.0
    for _ in range(3000):
        now += draw.random()
        seen.append((now, draw.random() ** 8))
        pauses.add(*seen[-1])
        expected = max(pause for at, pause in seen if now - int(at) <= WINDOW_SECONDS)
        assert pauses.longest(now) == expected
    assert pauses.longest(now + WINDOW_SECONDS + 2) == 0.0


def test_what_is_kept_is_bounded() -> None:
    pauses = Pauses()
    for number in range(100_000):
        pauses.add(number / 20, 1 / (1 + number))
    assert len(pauses) <= WINDOW_SECONDS + 1


async def test_code_that_does_not_await_is_measured_and_tasks_are_counted() -> None:
    metrics, computed = Metrics(), 0.0

    def value(name: str, **labels: str) -> float:
        found = metrics.registry.get_sample_value(f"matrixinfer_loop_{name}", labels)
        assert found is not None
        return found

    async with LoopWatch(time.monotonic, lambda: computed) as watch:
        metrics.register(watch)
        before = value("tasks")
        other = asyncio.create_task(asyncio.sleep(60))
        assert value("tasks") == before + 1
        other.cancel()
        time.sleep(0.3)  # noqa: ASYNC251 - the pause that is measured
        computed += 0.1
        await asyncio.sleep(0.1)
        assert value("pause_seconds", kind="elapsed") >= 0.24
        assert value("pause_seconds", kind="cpu") == 0.1
