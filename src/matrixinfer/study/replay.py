"""The replay: requests, engines and gateways on one virtual clock. No sockets, no event loop, no waiting.

    arrival ── router ──> engine ── step ── first token, end ──> router, dependent turns
                  ^                   └──── KV events ── delay ──┘

Equal settings give equal results.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from heapq import heappop, heappush
from typing import TypeAlias

from matrixinfer.pods.registry import EngineMetrics
from matrixinfer.study.engine import Engine, Run
from matrixinfer.study.faults import Fault
from matrixinfer.study.fleet import Fleet, Pod, Sample
from matrixinfer.study.gossip import Gossip
from matrixinfer.study.jobs import Job, Router
from matrixinfer.study.ladder import ReplayLadder
from matrixinfer.study.pool import Pool
from matrixinfer.study.publisher import Publisher
from matrixinfer.study.trace import LetterBlocks, Trace

RouterOf: TypeAlias = Callable[["Replay", int], Router]
"""Makes the router of a gateway."""

_RETRY_SECONDS = 1.0
_MOST_ATTEMPTS = 600

_Event: TypeAlias = tuple[float, int, Callable[[float], None]]


class Replay:
    """One trace, on one fleet, by one policy. `shares_cache` gives all pods one cache, as large as theirs together."""

    def __init__(
        self,
        trace: Trace,
        fleet: Fleet,
        router_of: RouterOf,
        *,
        publishes: bool,
        shares_cache: bool = False,
        blocks: LetterBlocks | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.trace = trace
        self.fleet = fleet
        self.blocks = LetterBlocks() if blocks is None else blocks
        self.now = 0.0
        self.pods: dict[str, Pod] = {}
        self.jobs: list[Job] = []
        self.ladder = ReplayLadder(self.pods, trace.block_size, self.clock)
        self.too_long = 0
        self.broken_off = 0
        """Requests whose pod went down after their first token, or that no pod could take for ten minutes."""
        self.samples: list[Sample] = []
        self._publishes = publishes
        self._shared = Pool(fleet.pods * fleet.pod_tokens // fleet.shape.block_size) if shares_cache else None
        self._router_of = router_of
        self._routers: list[Router] = []
        self._events: list[_Event] = []
        self._order = 0
        self._next_of: dict[int, list[int]] = {}
        self._open = len(trace.turns)
        self._progress = progress
        self._gossip: Gossip | None = None
        self._rng = random.Random(fleet.seed)  # noqa: S311  # a simulation

    def clock(self) -> float:
        """The virtual time."""
        return self.now

    def run(self) -> None:
        """Replay everything."""
        for number in range(self.fleet.pods):
            self._add_pod(number)
        self._start_routers()
        for number, turn in enumerate(self.trace.turns):
            if turn.after is None:
                self._at(turn.delay / self.fleet.rate_scale, self._arrival(number))
            else:
                self._next_of.setdefault(turn.after, []).append(number)
        for fault in self.fleet.faults:
            if fault.kind != "small":
                self._at(fault.at, self._fault(fault))
        self._at(0.0, self._scrape)
        if self.fleet.gossip and self.fleet.gateways > 1:
            self._gossip = Gossip(self._routers, self.fleet.gossip_delay, self._at)
            self._gossip.start()
        events = self._events
        while events and self._open:
            self.now, _, act = heappop(events)
            act(self.now)

    # Time

    def _at(self, when: float, act: Callable[[float], None]) -> None:
        self._order += 1
        heappush(self._events, (when, self._order, act))

    def _wake(self, pod: Pod) -> None:
        """Look at a pod again when its step ends."""
        ends_at = pod.engine.ends_at
        if ends_at == pod.scheduled:
            return
        pod.scheduled = ends_at
        if ends_at < math.inf:
            self._at(ends_at, lambda now: self._stepped(pod, now))

    # Requests

    def _arrival(self, number: int) -> Callable[[float], None]:
        return lambda now: self._arrived(number, now)

    def _arrived(self, number: int, now: float) -> None:
        turn = self.trace.turns[number]
        job = Job(number, turn.session, turn.prompt, turn.reply, self.blocks.of_turn(number, turn), now)
        if all(turn.prompt + turn.reply > pod.engine.capacity for pod in self.pods.values()):
            self.too_long += 1
            self._over(number, now)
            return
        self.jobs.append(job)
        self._send(job, now)

    def _send(self, job: Job, now: float, attempt: int = 1) -> None:
        whole = job.prompt + job.reply
        able = {name for name, pod in self.pods.items() if pod.is_up and pod.is_listed and whole <= pod.engine.capacity}
        if not able:
            if attempt < _MOST_ATTEMPTS:
                self._at(now + _RETRY_SECONDS, lambda later: self._send(job, later, attempt + 1))
                return
            self.broken_off += 1
            self._over(job.number, now)
            return
        job.router = self._rng.randrange(len(self._routers)) if len(self._routers) > 1 else 0
        job.pod = self._routers[job.router].route(job, [name for name in self.pods if name not in able])
        if self._gossip is not None:
            self._gossip.speak_at(job.router, now)
        self.ladder.sent(job, self._routers[job.router])
        pod = self.pods[job.pod]
        pod.engine.submit(Run(job, job.prompt, job.reply, job.hashes), now)
        if pod.engine.ends_at == math.inf:
            pod.engine.start(now)
        self._wake(pod)

    def _stepped(self, pod: Pod, now: float) -> None:
        engine = pod.engine
        if pod.scheduled != now or engine.ends_at != now:
            return  # the step was cut short, or lost
        end = engine.finish()
        if end.stored and pod.publisher is not None:
            frame = pod.publisher.frame(end.stored, now)
            if frame is not None:
                for router in self._routers:
                    router.publish(frame)
        for run in end.first:
            job: Job = run.owner
            job.first, job.cached = now, run.cached or 0
            if job.router >= 0:
                self._routers[job.router].answered(job)
        for run in end.finished:
            job = run.owner
            job.ended = now
            if job.router >= 0:
                self._routers[job.router].ended(job)
            self.ladder.ended(job)
            self._over(job.number, now)
        if pod.resets and not engine.running:
            self._reset(pod, now)
        engine.start(now)
        self._wake(pod)

    def _over(self, number: int, now: float) -> None:
        self._open -= 1
        self._progress(len(self.trace.turns) - self._open)
        for after in self._next_of.pop(number, ()):
            turn = self.trace.turns[after]
            self._at(max(now + turn.delay, turn.not_before / self.fleet.rate_scale), self._arrival(after))

    # The fleet

    def letters_of(self, job: Job, first: int, last: int) -> list[int]:
        """The letters of a request's blocks [first, last), for its events."""
        return list(self.trace.turns[job.number].letters[first:last])

    def _add_pod(self, number: int) -> Pod:
        fleet, name = self.fleet, f"pod-{number}"
        small = next((fault.value for fault in fleet.faults if fault.kind == "small" and fault.pod == number), 1.0)
        pool = self._shared or Pool(max(1, int(fleet.pod_tokens * small) // fleet.shape.block_size))
        publisher = None
        if self._publishes:
            publisher = Publisher(
                name, self.letters_of, delay=fleet.event_delay, lost=fleet.event_loss, seed=fleet.seed * 1000 + number
            )
        pod = self.pods[name] = Pod(name, Engine(fleet.shape, pool), publisher)
        return pod

    @property
    def writer(self) -> Router | None:
        """The gateway whose index all share (`Fleet.shared_index`); None if each has its own, or to the first itself."""
        return self._routers[0] if self.fleet.shared_index and self._routers else None

    def _start_routers(self) -> None:
        self._routers.clear()
        for number in range(self.fleet.gateways):
            self._routers.append(self._new_router(number))

    def _new_router(self, number: int) -> Router:
        router = self._router_of(self, number)
        for pod in self.pods.values():
            if pod.is_listed:
                router.join(pod.name)
                if not pod.is_up:
                    router.down(pod.name)
        return router

    def asked(self, gateway: int, pod: str, start: int) -> None:
        """A gateway asks an engine for the events from `start` on."""

        def answer(_: float) -> None:
            publisher = self.pods[pod].publisher
            frames = [] if publisher is None else publisher.since(start)
            self._routers[gateway].replayed(pod, start, frames)

        publisher = self.pods[pod].publisher
        is_new = publisher is None or publisher.is_untouched
        self._at(self.now + (0.0 if is_new else self.fleet.replay_delay), answer)

    def _scrape(self, now: float) -> None:
        for pod in self.pods.values():
            if not pod.is_up or not pod.is_listed:
                continue
            if not self._publishes:
                continue  # nobody reads them
            engine = pod.engine
            metrics = EngineMetrics(
                running=engine.running,
                waiting=len(engine.waiting),
                cache_usage=engine.usage,
                read_at=now,
                block_size=self.fleet.shape.block_size,
                cache_tokens=engine.capacity,
            )
            for router in self._routers:
                router.measured(pod.name, metrics)
        self.samples.append(
            Sample(
                at=now,
                requests=[pod.engine.running + len(pod.engine.waiting) for pod in self.pods.values()],
                usage=[pod.engine.usage for pod in self.pods.values()],
            )
        )
        self._at(now + self.fleet.scrape_interval, self._scrape)

    # Faults

    def _fault(self, fault: Fault) -> Callable[[float], None]:
        return lambda now: self._happens(fault, now)

    def _happens(self, fault: Fault, now: float) -> None:
        if fault.kind == "join":
            pod = self._add_pod(len(self.pods))
            for router in self._routers:
                router.join(pod.name)
            return
        if fault.kind == "forget":
            self._forget()
            return
        pod = self.pods[f"pod-{fault.pod}"]
        if fault.kind == "slow":
            pod.engine.slowness = fault.value
        elif fault.kind == "reset":
            pod.resets = True
            if not pod.engine.running:
                self._reset(pod, now)
        elif fault.kind == "leave":
            pod.is_listed = False
            self.ladder.emptied(pod.name)
            for router in self._routers:
                router.leave(pod.name)
        else:
            self._restart(pod, fault.value, now)

    def _reset(self, pod: Pod, now: float) -> None:
        pod.resets = not pod.engine.reset()
        if not pod.resets:
            self.ladder.emptied(pod.name)
        frame = None if pod.resets or pod.publisher is None else pod.publisher.cleared(now)
        if frame is not None:
            for router in self._routers:
                router.publish(frame)

    def _restart(self, pod: Pod, seconds: float, now: float) -> None:
        lost = pod.engine.abort_all()
        pod.preemptions += pod.engine.preemptions
        pod.busy_seconds += pod.engine.busy_seconds
        pod.is_up, pod.scheduled = False, math.inf
        self.ladder.emptied(pod.name)
        slowness, capacity = pod.engine.slowness, pod.engine.pool.capacity
        pod.engine = Engine(self.fleet.shape, self._shared or Pool(capacity), slowness=slowness)
        for router in self._routers:
            router.down(pod.name)
        if pod.publisher is not None:
            pod.publisher.restart()
        self._at(now + seconds, lambda _: self._up(pod))
        for run in lost:
            job: Job = run.owner
            if job.router >= 0:
                self._routers[job.router].failed(job)
            if job.first is None:
                self._send(job, now)
            else:
                self.broken_off += 1
                self._over(job.number, now)

    def _up(self, pod: Pod) -> None:
        pod.is_up = True
        for router in self._routers:
            router.up(pod.name)

    def _forget(self) -> None:
        """Gateways restart. What they had in flight ends without them."""
        for job in self.jobs:
            if job.ended is None:
                job.router = -1
        self._start_routers()
