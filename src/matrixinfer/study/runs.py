"""Runs policies over a trace, one after the other or in several processes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import partial

from matrixinfer.study.fleet import Fleet, Sample
from matrixinfer.study.measures import measures
from matrixinfer.study.policies import POLICIES, Policy
from matrixinfer.study.replay import Replay
from matrixinfer.study.trace import LetterBlocks, Trace
from matrixinfer.study.workers import workers
from matrixinfer.traffic.ladder.rungs import Ladder

_MOST_SAMPLES = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one policy did with a trace."""

    policy: str
    results: Mapping[str, float | int | None]
    requests: Sequence[tuple[float, float, int, int]]
    """Of each request that got a first token: when it arrived, how long that took, its prompt's tokens, cached ones."""
    samples: Sequence[Sample]
    ladder: Ladder
    """Where prompt tokens were lost."""


def replay(
    trace: Trace,
    fleet: Fleet,
    policy: Policy,
    *,
    blocks: LetterBlocks | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Replay a trace by one policy. `progress` gets the number of requests that are over."""
    run = Replay(
        trace,
        fleet,
        policy.make,
        publishes=policy.publishes,
        shares_cache=policy.shares_cache,
        blocks=blocks,
        progress=progress,
    )
    was_enabled = gc.isenabled()
    gc.disable()  # nothing in a replay is in a cycle, and looking for cycles takes a quarter of its time
    try:
        run.run()
    finally:
        if was_enabled:
            gc.enable()
    every = -(-len(run.samples) // _MOST_SAMPLES)
    return Outcome(
        policy=policy.name,
        results=measures(run),
        requests=[
            (job.arrived, job.first - job.arrived, job.prompt, job.cached) for job in run.jobs if job.first is not None
        ],
        ladder=run.ladder.result(),
        samples=run.samples[:: max(1, every)],
    )


def replay_all(
    trace: Trace,
    fleet: Fleet,
    policies: Sequence[Policy],
    *,
    jobs: int = 1,
    progress: Callable[[str, int], None] = lambda _name, _done: None,
) -> Iterator[Outcome]:
    """Replay a trace by each policy. With several `jobs` the outcomes come as they are ready, in any order.

    `progress` gets the name of a policy, and how many of its requests are over.
    """
    if min(jobs, len(policies)) < 2:
        blocks = LetterBlocks()
        for policy in policies:
            yield replay(trace, fleet, policy, blocks=blocks, progress=partial(progress, policy.name))
        return
    with workers(min(jobs, len(policies))) as pool:
        for ready in as_completed([pool.submit(_replay_by_name, trace, fleet, policy.name) for policy in policies]):
            outcome = ready.result()
            progress(outcome.policy, len(trace.turns))
            yield outcome


def _replay_by_name(trace: Trace, fleet: Fleet, name: str) -> Outcome:
    return replay(trace, fleet, POLICIES[name])
