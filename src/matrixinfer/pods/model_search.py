"""Asks engines again which models they serve, when somebody wants one that none of them has reported.

An adapter that was loaded a moment ago is then served at once, and not only after the next discovery.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

import structlog

from matrixinfer.pods.engine_api import EngineDown, OutOfResources
from matrixinfer.pods.pod import Pod
from matrixinfer.pods.registry import PodRegistry

PAUSE_SECONDS = 0.5
"""A pod is asked at most this often; who comes earlier waits and shares the next answer."""
WAIT_SECONDS = 2.0
"""Nobody waits longer than this for the answers."""

log = structlog.get_logger(__name__)


class ModelSearch:
    """One question at a time to each healthy pod. Use as an async context manager; call it within.

    `ask` asks a pod which models it serves and puts the answer into the registry.
    """

    def __init__(self, registry: PodRegistry, ask: Callable[[Pod], Awaitable[None]]) -> None:
        self._registry = registry
        self._ask_models = ask
        self._asking: dict[Pod, asyncio.Task[None]] = {}
        self._asked_at: dict[Pod, float] = {}
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        """Be ready to ask."""
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._asking.values():
            task.cancel()
        # The group must not see the caller's error: it would wrap it in an exception group.
        await self._group.__aexit__(None, None, None)

    async def __call__(self, is_found: Callable[[], bool]) -> bool:
        """Ask the pods until `is_found`, for a while. Returns what `is_found` says at the end."""
        waiting = {self._question(pod) for pod in self._registry.pods if pod.healthy}
        with suppress(TimeoutError):
            async with asyncio.timeout(WAIT_SECONDS):
                while waiting and not is_found():
                    _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        return is_found()

    def _question(self, pod: Pod) -> asyncio.Task[None]:
        """The question to a pod that has not been sent yet, or else is on its way; a new one if there is none."""
        if pod not in self._asking:
            task = self._group.create_task(self._ask(pod), name=f"models of {pod.name}")
            task.add_done_callback(lambda _: self._asking.pop(pod, None))
            self._asking[pod] = task
        return self._asking[pod]

    async def _ask(self, pod: Pod) -> None:
        clock = self._registry.clock
        await asyncio.sleep(self._asked_at.get(pod, -PAUSE_SECONDS) + PAUSE_SECONDS - clock())
        self._asked_at = {each: at for each, at in self._asked_at.items() if not each.gone}
        self._asked_at[pod] = clock()
        try:
            await self._ask_models(pod)
        except (EngineDown, OutOfResources):
            pass  # its watcher finds out, and says so
        except Exception:
            # Supervision boundary: an error over one pod must not end the gateway.
            log.exception("model_search_failed", pod=pod.name)
