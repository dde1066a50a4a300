"""The ladder of a replay: as `traffic.ladder` keeps it for a gateway, but with what the engines really held."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from matrixinfer.study.engine import Engine
from matrixinfer.study.gateway import MODEL, Gateway
from matrixinfer.study.jobs import Job, Router
from matrixinfer.traffic.ladder.record import Ended, LadderLog
from matrixinfer.traffic.ladder.rungs import Ladder

_MOST_BLOCKS = 1 << 13
"""Traces with more different blocks are sampled."""


class Replica(Protocol):
    """A pod of the replay."""

    engine: Engine
    is_up: bool
    is_listed: bool


class _Sent(NamedTuple):
    at: float
    best: int
    predicted: int
    why_other: str
    capacity: int
    pods: int


class ReplayLadder:
    """Follows each request from its decision to its end. `pods` is the fleet by name, as it is at any time."""

    def __init__(self, pods: Mapping[str, Replica], block_size: int, clock: Callable[[], float]) -> None:
        self._pods = pods
        self._block_size = block_size
        self._clock = clock
        self._log = LadderLog(clock, most_blocks=_MOST_BLOCKS, kept_seconds=float("inf"), most_touched=float("inf"))
        self._log.serves(MODEL, MODEL)
        self._sent: dict[int, _Sent] = {}

    def sent(self, job: Job, router: Router) -> None:
        """A request has been sent to `job.pod`; nothing else has happened since."""
        now, size = self._clock(), self._block_size
        usable = (job.prompt - 1) // size
        held = min(self._pods[job.pod].engine.pool.count(job.hashes), usable)
        best, blocks = self._best(job, held, usable)
        predicted = held * size if job.predicted is None else job.predicted
        most = max(blocks * size, predicted)
        why = self._why_other(job, router, best, most) if most > predicted else "scored"
        pools = {id(pod.engine.pool): pod.engine.capacity for pod in self._pods.values() if pod.is_listed}
        self._sent[job.number] = _Sent(now, most, predicted, why, sum(pools.values()), len(pools))
        self._log.stored(MODEL, job.pod, job.hashes[most // size : job.prompt // size])

    def ended(self, job: Job) -> None:
        """The answer is complete."""
        sent = self._sent.pop(job.number)
        size = self._block_size
        request = Ended(
            model=MODEL,
            base_model=MODEL,
            prompt_tokens=job.prompt,
            hashes=job.hashes,
            block_size=size,
            usable=max((job.prompt - 1) // size * size, sent.best),
            held=sent.best,
            best=sent.best,
            predicted=sent.predicted,
            why_other=sent.why_other,
            reported=job.cached,
            decided_at=sent.at,
            endpoint=job.pod,
            capacity=sent.capacity,
            pods=sent.pods,
            why_gone=self._why_gone,
        )
        self._log.ended(request)

    def emptied(self, pod: str) -> None:
        """A pod has lost its cache."""
        self._log.emptied(pod)

    def result(self) -> Ladder:
        """Of all requests that have ended."""
        return self._log.since(float("inf"))

    def _best(self, job: Job, held: int, usable: int) -> tuple[str, int]:
        """Which pod holds most usable blocks of a prompt, and how many, where `job.pod` holds `held`."""
        best, most = job.pod, held
        for name, pod in self._pods.items():
            pool = pod.engine.pool
            if most < usable and pod.is_up and pod.is_listed and job.hashes[most] in pool.cached:
                count = min(pool.count(job.hashes), usable)
                if count > most:
                    best, most = name, count
        return best, most

    def _why_other(self, job: Job, router: Router, best: str, tokens: int) -> str:
        """Why a request went to a pod that is predicted to reuse less: the name of a cause."""
        if isinstance(router, Gateway):
            known = max(router.holds(job.hashes[: tokens // self._block_size]).values(), default=0)
            if known * self._block_size < tokens:
                return "unheard"
        there, here = self._pods[best].engine, self._pods[job.pod].engine
        is_busier = there.running + len(there.waiting) > here.running + len(here.waiting)
        return "busier" if is_busier else "scored"

    def _why_gone(self, pod: str) -> str:
        return "dropped" if self._pods[pod].is_listed else "emptied"
