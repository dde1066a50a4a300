"""What a replay has shown, in numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from matrixinfer.study.jobs import Job
from matrixinfer.study.replay import Replay


def measures(replay: Replay) -> dict[str, float | int | None]:
    """The result of one policy. Times are in seconds; None where no request shows a value."""
    jobs = [job for job in replay.jobs if job.first is not None]
    done = [job for job in jobs if job.ended is not None]
    first = np.array([job.first - job.arrived for job in jobs if job.first is not None])
    whole = np.array([job.ended - job.arrived for job in done if job.ended is not None])
    prompt = sum(job.prompt for job in jobs)
    predicted = [job.predicted for job in jobs]
    results: dict[str, float | int | None] = {
        "hit_rate": _ratio(sum(job.cached for job in jobs), prompt),
        "predicted_hit_rate": None if None in predicted else _ratio(sum(filter(None, predicted)), prompt),
        "ttft_mean_s": _rounded(first.mean()) if len(first) else None,
    }
    for percent in (50, 90, 99):
        results[f"ttft_p{percent}_s"] = _rounded(np.percentile(first, percent)) if len(first) else None
    return results | {
        "tpot_s": tpot(done),
        "latency_mean_s": _rounded(whole.mean()) if len(whole) else None,
        "imbalance": imbalance(replay),
        "requests": len(replay.jobs),
        "too_long": replay.too_long,
        "broken_off": replay.broken_off,
        "preemptions": sum(pod.preemptions + pod.engine.preemptions for pod in replay.pods.values()),
        "duration_s": _rounded(replay.now),
    }


def tpot(jobs: Sequence[Job]) -> float | None:
    """Seconds per output token after the first, over all replies."""
    seconds = tokens = 0.0
    for job in jobs:
        if job.first is not None and job.ended is not None and job.reply > 1:
            seconds += job.ended - job.first
            tokens += job.reply - 1
    return _rounded(seconds / tokens) if tokens else None


def imbalance(replay: Replay) -> float | None:
    """The busiest pod's time in steps, in multiples of the mean; 1 is even."""
    busy = [pod.busy_seconds + pod.engine.busy_seconds for pod in replay.pods.values()]
    mean = sum(busy) / len(busy)
    return _rounded(max(busy) / mean) if mean else None


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
