from __future__ import annotations

import asyncio

import pytest

from matrixinfer import tasks
from matrixinfer.tasks import cancel_all


async def test_all_tasks_are_over_however_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_RETRY_SECONDS", 0.01)
    swallowed = 0

    async def stubborn() -> None:
        nonlocal swallowed
        for _ in range(3):
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                swallowed += 1

    async def fails() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            raise ValueError("on its way out")

    begun = {asyncio.create_task(each()) for each in (stubborn, fails)}
    await asyncio.sleep(0)
    await cancel_all(begun)
    assert all(task.done() for task in begun)
    assert swallowed == 3
    await cancel_all(())
