"""A fleet in virtual time: the real scheduler and load ledger before a small model of engines with queues and caches."""

from __future__ import annotations

import heapq
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from matrixinfer.config import SchedulerConfig
from matrixinfer.kvevents.footprint import Footprint
from matrixinfer.routing.holdings import charge
from matrixinfer.routing.observed import Observed
from matrixinfer.scheduler.framework import Candidate, SchedulingRequest, Services
from matrixinfer.scheduler.plugins import BUILT_IN
from matrixinfer.scheduler.policies import with_policy
from matrixinfer.scheduler.scheduler import Scheduler
from matrixinfer.traffic.load import LoadLedger
from matrixinfer.traffic.peers.loads import PeerLoads

BLOCK = 128


@dataclass(kw_only=True)
class Asked:
    """One request, and what became of it."""

    chain: Sequence[int]
    session: str | None = None
    decode_seconds: float = 1.0
    label: str = ""
    at: float = 0.0
    pod: str = ""
    ttft: float = -1.0
    cached: int = 0
    """Blocks found in the cache."""
    done: Callable[[], None] | None = None
    """Called when its answer is over."""


@dataclass(kw_only=True)
class Engine:
    """One prompt at a time, first come first served; a cache of whole blocks, least recently used from the tails."""

    name: str
    rate: float = 8_000.0
    """Prompt tokens per second."""
    capacity: int = 100_000
    """Blocks."""
    queue: deque[tuple[Asked, Callable[[], None], Callable[[], None]]] = field(default_factory=deque)
    busy: bool = False
    active: int = 0
    blocks: OrderedDict[int, None] = field(default_factory=OrderedDict)
    footprint: Footprint = field(default_factory=Footprint)

    def held(self, chain: Sequence[int]) -> int:
        return next((i for i, block in enumerate(chain) if block not in self.blocks), len(chain))

    def store(self, chain: Sequence[int]) -> None:
        for block in reversed(chain):
            self.blocks[block] = None
            self.blocks.move_to_end(block)
        while len(self.blocks) > self.capacity:
            self.blocks.popitem(last=False)
            self.footprint.evicted_tokens += BLOCK
        self.footprint.holds(len(self.blocks) * BLOCK)


class Fleet:
    """Engines, and one gateway that knows what they hold. `policy` names a profile."""

    def __init__(self, policy: str, engines: Sequence[Engine]) -> None:
        self.now = 0.0
        self.engines = {engine.name: engine for engine in engines}
        services = Services(clock=lambda: self.now, rng=random.Random(0))
        self.scheduler = Scheduler(with_policy(SchedulerConfig(), policy), services, BUILT_IN)
        self.load = LoadLedger(lambda: self.now, 2.0)
        self.observed = Observed(self.load, PeerLoads())
        self.sent: list[Asked] = []
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (when, next(self._order), act))

    def ask(self, when: float, asked: Asked) -> None:
        self.at(when, lambda: self._send(asked))

    def run(self, until: float = float("inf")) -> None:
        while self._heap and self._heap[0][0] <= until:
            self.now, _, act = heapq.heappop(self._heap)
            act()

    def candidate(self, engine: Engine, request: SchedulingRequest) -> Candidate:
        name, chain, footprint = engine.name, request.chain, engine.footprint
        matched = engine.held(chain)
        in_flight, queued, seconds, rate = self.load.view(name, self.now)
        return Candidate(
            name=name,
            url=f"http://{name}",
            in_flight=in_flight,
            queued_tokens=queued,
            foreign=0,
            queue_seconds=seconds,
            condition=self.observed.condition(
                name, self.now, rate=rate, footprint=footprint, reported=engine.capacity * BLOCK
            ),
            trust="exact",
            engine_block=BLOCK,
            matched_blocks=matched,
            pending_blocks=self.load.pending(name, "m", chain, matched),
        )

    def _send(self, asked: Asked) -> None:
        asked.at = self.now
        self.sent.append(asked)
        request = SchedulingRequest(
            id="r",
            model="m",
            prompt_tokens=len(asked.chain) * BLOCK + 1,
            block_size=BLOCK,
            chain=tuple(asked.chain),
            prefix=b"",
            session=asked.session,
            now=self.now,
        )
        pods = [self.candidate(engine, request) for engine in self.engines.values()]
        chosen = self.scheduler.schedule(request, pods).chosen
        asked.pod = chosen.name
        charged = charge(self.load, request, chosen)
        engine = self.engines[chosen.name]
        engine.queue.append((asked, charged.first_byte, charged.release))
        self._start(engine)

    def _start(self, engine: Engine) -> None:
        if engine.busy or not engine.queue:
            return
        engine.busy = True
        asked, first_byte, release = engine.queue.popleft()
        asked.cached = engine.held(asked.chain)
        uncached = (len(asked.chain) - asked.cached) * BLOCK + 1
        seconds = 0.01 + uncached / engine.rate * (1 + 0.02 * engine.active)

        def computed() -> None:
            engine.busy = False
            engine.active += 1
            engine.store(asked.chain)
            asked.ttft = self.now - asked.at
            first_byte()
            self.at(self.now + asked.decode_seconds, ended)
            self._start(engine)

        def ended() -> None:
            engine.active -= 1
            release()
            if asked.done is not None:
                asked.done()

        self.at(self.now + seconds, computed)

    # What came of it

    def mean_ttft(self, label: str = "") -> float:
        times = [each.ttft for each in self.sent if each.label == label and each.ttft >= 0]
        return sum(times) / len(times)

    def slowest(self, label: str = "") -> float:
        return max(each.ttft for each in self.sent if each.label == label)

    def spread(self, label: str = "") -> Counter[str]:
        return Counter(each.pod for each in self.sent if each.label == label)

    def hit_rate(self) -> float:
        return sum(each.cached for each in self.sent) / sum(len(each.chain) for each in self.sent)


_serial = count(1)


def new_blocks(blocks: int) -> list[int]:
    """Blocks that no other prompt has."""
    return [next(_serial) for _ in range(blocks)]


def equal(count: int, **fields: float) -> list[Engine]:
    return [Engine(name=f"pod-{i}", **fields) for i in range(count)]  # type: ignore[arg-type]


def conversation(
    fleet: Fleet,
    start: float,
    *,
    first: int,
    turns: int,
    grows: int = 4,
    pause: float = 3.0,
    label: str = "",
    session: str | None = None,
    decode_seconds: float = 1.0,
) -> None:
    """A conversation: each turn is asked some time after the answer to the one before."""
    chain, left = new_blocks(first), count()

    def turn() -> None:
        number = next(left)
        if number == turns:
            return
        chain.extend(new_blocks(grows if number else 0))
        fleet.ask(
            fleet.now + (pause if number else 0.0),
            Asked(chain=list(chain), label=label, done=turn, session=session, decode_seconds=decode_seconds),
        )

    fleet.at(start, turn)


def poisson(rate: float, seconds: float, seed: int = 0) -> Iterator[float]:
    """Times of arrivals."""
    draw, now = random.Random(seed), 0.0
    while (now := now + draw.expovariate(rate)) < seconds:
        yield now
