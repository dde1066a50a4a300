"""The receiver that `docs/library.md` shows, against a publisher with real sockets."""

from __future__ import annotations

import asyncio
import re
import threading
from pathlib import Path
from typing import Any

from matrixinfer import Index
from tests.waiting import eventually

from .kvevents_support import TOKENS, Engine, stored

PAGE = (Path(__file__).parents[2] / "docs" / "library.md").read_text()


async def matches(index: Index, lock: threading.Lock, blocks: int) -> None:
    """Wait until the index knows that pod a holds so many blocks."""

    def is_exact() -> bool:
        with lock:
            return index.match(TOKENS, model="m") == {"a": blocks} and index.trust("a") == "exact"

    await eventually(is_exact)


async def test_it_fetches_history_and_follows_live() -> None:
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[1], names)  # noqa: S102 - our own documentation
    index, lock, stop = Index(block_size=16), threading.Lock(), threading.Event()
    async with Engine() as engine:
        engine.publish(stored(0, 2))
        addresses = engine.publisher.endpoint, engine.publisher.replay_endpoint
        following = asyncio.create_task(
            asyncio.to_thread(names["follow"], index, lock, stop, "a", "m", *addresses), name="receiver"
        )
        await matches(index, lock, 2)
        engine.publish(stored(2, 3))
        await matches(index, lock, 3)
        stop.set()
        engine.publish(stored(3, 4))  # wakes the receiver, which else waits for ten seconds
        await following
