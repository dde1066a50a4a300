"""What no gateway can do: they read the engines' own state. They say how much is left to gain."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from matrixinfer.pods.registry import EngineMetrics
from matrixinfer.study.jobs import Frame, Job
from matrixinfer.study.replay import Pod, Replay


class Oracle:
    """Chooses the pod with the least `cost`, in seconds until the first token; the fewest requests decide between equals."""

    def __init__(self, replay: Replay, gateway: int) -> None:
        self._replay = replay

    def cost(self, pod: Pod, job: Job) -> float:
        """How long the request would wait there."""
        engine, timing = pod.engine, pod.engine.shape.timing
        hit = engine.pool.count(job.hashes[: (job.prompt - 1) // engine.shape.block_size])
        tokens = engine.uncomputed_tokens + job.prompt - hit * engine.shape.block_size
        # Decoding requests take a part of every step until the prompt is computed.
        steps = -(-tokens // (engine.shape.max_tokens - min(engine.running, engine.shape.max_sequences)))
        decoding = timing.step + engine.decode_seconds
        return (steps * decoding + tokens * timing.prefill_token) * engine.slowness

    def route(self, job: Job, without: Collection[str] = ()) -> str:
        """Choose the least cost."""
        pods = [pod for pod in self._replay.pods.values() if pod.is_listed and pod.is_up]
        pods = [pod for pod in pods if pod.name not in without] or pods or list(self._replay.pods.values())
        return min(pods, key=lambda pod: (self.cost(pod, job), pod.engine.running)).name

    def answered(self, job: Job) -> None:
        """The engines know."""

    def ended(self, job: Job) -> None:
        """The engines know."""

    def failed(self, job: Job) -> None:
        """The engines know."""

    def join(self, pod: str) -> None:
        """The fleet knows."""

    def leave(self, pod: str) -> None:
        """The fleet knows."""

    def down(self, pod: str) -> None:
        """The fleet knows."""

    def up(self, pod: str) -> None:
        """The fleet knows."""

    def measured(self, pod: str, metrics: EngineMetrics) -> None:
        """The engines know."""

    def publish(self, frame: Frame) -> None:
        """The engines know."""

    def replayed(self, pod: str, start: int, frames: Sequence[tuple[int, bytes]]) -> None:
        """The engines know."""


class EarliestToken(Oracle):
    """The earliest first token of this request, without regard to later ones."""


class LeastWork(Oracle):
    """The same: with one cache of all pods every hit is found everywhere, and only queues differ."""
