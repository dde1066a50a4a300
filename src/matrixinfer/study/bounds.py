"""What no gateway can do: they read the engines' own state. They say how much is left to gain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from matrixinfer.study.fleet import Pod
from matrixinfer.study.jobs import Job, Router
from matrixinfer.study.replay import Replay


class Oracle(Router):
    """Chooses the pod with the least `cost`, in seconds, counted in milliseconds.

    The cost is the time until the first token, and the time to compute again what the prompt pushes out of the cache, if a
    request that has not come yet needs it. Between equals the fewest requests decide, and then the least work so far.
    """

    def __init__(self, replay: Replay, gateway: int) -> None:
        self._replay = replay
        self._needed: Counter[int] = Counter()
        """How many of the requests to come have each block."""
        for number, turn in enumerate(replay.trace.turns):
            self._needed.update(self._blocks_of(turn.prompt, replay.blocks.of_turn(number, turn)))

    def cost(self, pod: Pod, job: Job) -> float:
        """What the request would cost there."""
        engine, timing = pod.engine, pod.engine.shape.timing
        tokens = engine.work_with(job.prompt, job.hashes)
        # Decoding requests take a part of every step until the prompt is computed.
        steps = -(-tokens // (engine.shape.max_tokens - min(engine.running, engine.shape.max_sequences)))
        decoding = timing.step + engine.decode_seconds
        lost = sum(self._needed[key] > 0 for key in engine.pool.pushed_out(tokens // engine.shape.block_size))
        again = lost * engine.shape.block_size * timing.prefill_token
        return (steps * decoding + tokens * timing.prefill_token + again) * engine.slowness

    def route(self, job: Job, without: Collection[str] = ()) -> str:
        """Choose the least cost."""
        if job.pod == "":
            self._needed.subtract(self._blocks_of(job.prompt, job.hashes))
        pods = [pod for pod in self._replay.pods.values() if pod.is_listed and pod.is_up]
        pods = [pod for pod in pods if pod.name not in without] or pods or list(self._replay.pods.values())
        costs = {pod.name: round(self.cost(pod, job), 3) for pod in pods}
        return min(pods, key=lambda pod: (costs[pod.name], pod.engine.running, pod.engine.busy_seconds)).name

    def _blocks_of(self, prompt: int, hashes: Sequence[int]) -> Sequence[int]:
        return hashes[: prompt // self._replay.trace.block_size]


class EarliestToken(Oracle):
    """With a cache for each pod."""


class LeastWork(Oracle):
    """With one cache of all pods every hit is found everywhere, and only queues differ."""
