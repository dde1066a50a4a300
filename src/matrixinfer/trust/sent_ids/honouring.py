"""Which engines are known to make the same answer from token ids, and the questions that find that out.

Nothing is known about an engine before the first request that could be sent so: it goes as it came, and the engine is
asked meanwhile. What was found counts for this run of the engine. One that has restarted, has been down or says that it
is another is asked again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeAlias

import structlog

from matrixinfer.pods.pod import Pod
from matrixinfer.tasks import cancel_all
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.trust.sent_ids.found import Probed

Ask: TypeAlias = Callable[[Pod, str], Awaitable[Probed]]

AGAIN_SECONDS = 600.0
"""An engine that did not make the same answer is asked again after so long."""
SOON_SECONDS = 30.0
"""The least time from one question to an engine to the next at the same path."""
MOST_ASKED = 4
"""Engines that are asked at the same time."""

log = structlog.get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class _Known:
    run: object
    """Which run of the engine that is."""
    asked_at: float
    found: Probed | None = None
    """None while it is being asked."""


class Honouring:
    """Use as an async context manager, which ends the questions. `clock` gives seconds and never goes back.

    `ask` finds out about a pod's engine at a path; `on_other_run` is called with a pod whose engine is another than
    before, or another run of it.
    """

    def __init__(
        self,
        ask: Ask,
        clock: Callable[[], float],
        metrics: Metrics,
        on_other_run: Callable[[Pod], None] = lambda _: None,
    ) -> None:
        self._ask = ask
        self._clock = clock
        self._metrics = metrics
        self._on_other_run = on_other_run
        self._known: dict[str, dict[str, _Known]] = {}
        self._runs: dict[str, object] = {}
        self._asking: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await cancel_all(self._asking)

    def honours(self, pod: Pod, path: str) -> bool:
        """Whether the pod's engine is known to make the same answer from token ids. If not, it is asked soon."""
        known, run, now = self._known.get(pod.name, {}).get(path), _run_of(pod), self._clock()
        if self._runs.setdefault(pod.name, run) != run:  # whichever path the last question was about
            self._runs[pod.name] = run
            self._on_other_run(pod)
        is_same = known is not None and known.run == run
        if known is not None and is_same and (known.found is None or known.found.outcome == "honoured"):
            return known.found is not None
        patience = AGAIN_SECONDS if is_same else SOON_SECONDS
        if known is not None and now < known.asked_at + patience:
            return False
        if len(self._asking) < MOST_ASKED and pod.healthy and pod.asleep is None:
            entry = self._known.setdefault(pod.name, {})[path] = _Known(run=run, asked_at=now)
            task = asyncio.create_task(self._find_out(pod, path, entry), name=f"token ids {pod.name}")
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        return False

    def refused(self, pod: str, path: str) -> None:
        """The pod's engine has refused a request with token ids, so what was found about it is not so."""
        known = self._known.get(pod, {}).get(path)
        if known is not None and known.found is not None:
            known.found = Probed(path=path, outcome="refused", why="it has refused a request")
            known.asked_at = self._clock()
            self._report(pod, known.found)

    def view(self, pod: str) -> dict[str, dict[str, str | None]]:
        """What was found about the pod's engine, by path, as JSON-able data."""
        known = {path: each.found for path, each in self._known.get(pod, {}).items()}
        return {path: {"result": found.outcome, "reason": found.why} for path, found in known.items() if found}

    def forget(self, pod: str) -> None:
        """The pod has gone."""
        self._known.pop(pod, None)
        self._runs.pop(pod, None)

    async def _find_out(self, pod: Pod, path: str, entry: _Known) -> None:
        try:
            found = await self._ask(pod, path)
        except Exception:
            # Supervision boundary: requests are sent as they come, whatever becomes of the question.
            log.exception("token_ids_probe_failed", pod=pod.name)
            found = Probed(path=path, outcome="failed", why="an error of the gateway")
        entry.found = found
        if not pod.gone and _run_of(pod) == entry.run:
            self._report(pod.name, found)

    def _report(self, pod: str, found: Probed) -> None:
        self._metrics.token_ids_probed(found.outcome)
        if found.outcome == "honoured":
            log.info("token_ids_verified", pod=pod, path=found.path)
        else:
            log.warning("token_ids_not_used", pod=pod, path=found.path, result=found.outcome, reason=found.why)


def _run_of(pod: Pod) -> object:
    """Equal as long as the pod's engine has not restarted, been down, or become another."""
    served = None if pod.served is None else (pod.served.base_model, pod.served.root, pod.served.context_length)
    return (pod.config, pod.engine, pod.version, pod.restarts, pod.up_since, served)
