"""Asks engines which of them stores a response that this gateway has not passed on: another gateway may have."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from urllib.parse import quote

from matrixinfer.errors import Overloaded
from matrixinfer.pods.engine_api import EngineApi, EngineDown, OutOfResources
from matrixinfer.pods.pod import Pod
from matrixinfer.tasks import cancel_all

MOST_SEARCHES = 8
"""Searches at a time. Any client can cause one with an id of its own making."""
MOST_PODS = 64
"""Pods asked in one search."""
WAIT_SECONDS = 2.0
"""Nobody waits longer than this for their answers."""


class ResponseSearch:
    """Asks all healthy pods at once, and takes the first that has the response."""

    def __init__(self, api: EngineApi, pods: Callable[[], Sequence[Pod]]) -> None:
        self._api = api
        self._pods = pods
        self._searches = 0

    async def __call__(self, response_id: str) -> str | None:
        """The name of the pod that stores a response; None if none says so in time. Raises `Overloaded`."""
        if self._searches >= MOST_SEARCHES:
            raise Overloaded("Too many responses are being looked for. Try again later.")
        self._searches += 1
        try:
            return await self._search(response_id)
        finally:
            self._searches -= 1

    async def _search(self, response_id: str) -> str | None:
        pods = [pod for pod in self._pods() if pod.healthy][:MOST_PODS]
        tasks = [asyncio.create_task(self._has(pod, response_id)) for pod in pods]
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(WAIT_SECONDS):
                    for answer in asyncio.as_completed(tasks):
                        name = await answer
                        if name is not None:
                            return name
        finally:
            await cancel_all(tasks)
        return None

    async def _has(self, pod: Pod, response_id: str) -> str | None:
        try:
            answer = await self._api.ask(f"{pod.url}/v1/responses/{quote(response_id, safe='')}")
        except (EngineDown, OutOfResources):
            return None
        return pod.name if answer.status == 200 else None
