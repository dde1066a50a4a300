"""The dashboard of a gateway whose pods, caches and clock a test controls. Everything that is counted and served is real."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

from matrixinfer.config import Config, LimitsConfig, ModelConfig, OutliersConfig, PodConfig, PodWatchConfig
from matrixinfer.config.endpoint_names import EndpointName
from matrixinfer.dashboard.examination import Examination
from matrixinfer.dashboard.fleet import Fleet
from matrixinfer.dashboard.history import History
from matrixinfer.dashboard.live import About, Live
from matrixinfer.dashboard.pages import Dashboard
from matrixinfer.gateway.body import Bodies
from matrixinfer.gateway.guard import guarded
from matrixinfer.gateway.handlers import Admin
from matrixinfer.gateway.ladder_page import LadderPage
from matrixinfer.gateway.listener import Listener
from matrixinfer.index.ends import Rule
from matrixinfer.kvevents.footprint import Footprint
from matrixinfer.pods.engine_kind import EngineFacts
from matrixinfer.pods.outliers import Outliers
from matrixinfer.pods.pod import Drain
from matrixinfer.pods.registry import EngineMetrics, PodRegistry, ServedNames
from matrixinfer.prompt.memory import Memory
from matrixinfer.routing.decision_log import DecisionLog, Record, record
from matrixinfer.routing.router import Router
from matrixinfer.scheduler.framework import Candidate, Condition, Decision, SchedulingRequest, Trust
from matrixinfer.telemetry.intervals import Intervals
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.traffic.ladder.rungs import Ladder, of
from matrixinfer.traffic.ladder.tally import Tally, excess_step
from matrixinfer.traffic.load import Charge, LoadLedger
from matrixinfer.trust.cache_views import CacheView, FeedReports
from matrixinfer.trust.parity import Parity

BLOCK = 64
CACHE_TOKENS = 96_000
PREFILL_RATE = 9_000.0
MODELS = ("Qwen/Qwen3-8B", "meta-llama/Llama-3.3-70B-Instruct")
HISTORY_MISSING = (
    "events from before the first one that was read are missing, so hits may be longer than predicted; "
    "enable the engine's replay endpoint, or reset its cache"
)


@dataclass
class FakeCaches:
    """What is known about each endpoint's cache."""

    trust: dict[str, Trust] = field(default_factory=dict)
    limits: dict[str, tuple[str, ...]] = field(default_factory=dict)
    footprints: dict[str, Footprint] = field(default_factory=dict)

    def of(self, name: str) -> CacheView | None:
        trust = self.trust.get(name, "exact")
        if trust == "none":
            return None
        return CacheView(
            trust=trust,
            feed="complete" if trust == "exact" else "disconnected" if trust == "stale" else "gapped",
            engine_block=16,
            has_tails=False,
            tiers=(),
            hides_salts=False,
            footprint=self.footprints.setdefault(name, Footprint()),
        )

    def rule_of(self, name: str) -> Rule | None:
        return None

    def rules_of(self, names: Iterable[str]) -> Mapping[str, Rule]:
        return {}

    def limits_of(self, name: str) -> Sequence[str]:
        return self.limits.get(name, ())


@dataclass
class Conversation:
    """A prompt that grows with every turn."""

    model: str
    chain: list[int]
    tokens: int


class World:
    """Pods `pod-0`, `pod-1`, …, and what happens to them.

    `seconds_ago`: how far in the past it begins. `reports`: whether answers report cached tokens.
    """

    def __init__(
        self,
        pods: int,
        *,
        names: Sequence[str] | None = None,
        seconds_ago: float = 0.0,
        seed: int = 1,
        reports: bool = True,
    ) -> None:
        self.reports = reports
        self.names = list(names or (f"pod-{number}.inference" for number in range(pods)))
        self.shift = -seconds_ago
        self.draw = random.Random(seed)
        configs = tuple(
            PodConfig(name=name, url=f"http://10.0.{at // 250}.{at % 250 + 1}:8000", kv_events="none")
            for at, name in enumerate(self.names)
        )
        self.config = Config(pods=configs, models=tuple(ModelConfig(name=name) for name in MODELS))
        self.registry = PodRegistry(configs, self.config.models, PodWatchConfig(), clock=self.clock)
        self.caches = FakeCaches()
        self.outliers = Outliers(OutliersConfig(), self.clock)
        self.load = LoadLedger(self.clock, 30.0)
        self.history = History(self.clock)
        self.decisions = DecisionLog(1_000)
        self.held: dict[str, dict[int, None]] = {}
        self.seen: dict[int, None] = {}
        """Every block that was ever in a prompt."""
        self.tally = Tally(sums={"reported_requests": 0.0}, pods=pods, capacity=pods * CACHE_TOKENS)
        self.going: deque[tuple[Record, Charge]] = deque()
        self.doctor: tuple[str, ...] = ("cat",)
        self.draining = asyncio.Event()
        self.slow_start_seconds = 0.0
        self.recent: dict[str, float] = {}
        """Requests that each endpoint got lately; older ones count less."""
        for at, name in enumerate(self.names):
            self.come(name, MODELS[at * len(MODELS) // max(1, len(self.names)) if len(self.names) > 3 else 0])
        self.talks = (
            [self.talk(self.draw.choice(sorted(self.models))) for _ in range(max(48, 2 * pods))] if pods else []
        )

    def clock(self) -> float:
        return time.monotonic() + self.shift

    def wall(self) -> float:
        return time.time() + self.shift

    @property
    def models(self) -> set[str]:
        return {pod.base_model for pod in self.registry.pods if pod.base_model}

    def come(self, name: str, model: str) -> None:
        """The engine of a pod answers."""
        served = ServedNames(base_model=model, aliases=frozenset([model]), adapters={}, engine="vllm")
        self.registry.learn(name, served=served, facts=EngineFacts(kind="vllm", version="0.32.0"), kv_sources=())
        self.registry.answered(name)
        self.measure(name)

    def measure(self, name: str, running: int = 0, waiting: int = 0, usage: float = 0.0) -> None:
        self.registry.measured(
            name,
            EngineMetrics(
                running=running,
                waiting=waiting,
                cache_usage=usage,
                read_at=self.clock(),
                block_size=16,
                cache_tokens=CACHE_TOKENS,
            ),
        )

    def fleet(self) -> Fleet:
        return Fleet(
            self.registry,
            self.caches,
            self.outliers,
            self.load,
            self.history,
            slow_start_seconds=lambda: self.slow_start_seconds,
        )

    def drain(self, name: str, seconds: float) -> None:
        """Let a pod get no more requests."""
        pod = self.registry.pod(name)
        assert pod is not None
        self.registry.set_drain(pod, Drain(self.clock(), self.clock() + seconds))

    def die(self, name: str) -> None:
        for _ in range(2):
            self.registry.failed(name)

    def talk(self, model: str) -> Conversation:
        system = self.draw.randrange(3)
        shared = [hash((model, system, at)) & (1 << 63) - 1 for at in range(24)]
        return Conversation(model, list(shared), len(shared) * BLOCK + self.draw.randrange(BLOCK))

    def grow(self, talk: Conversation) -> None:
        """A question and the answer to the one before."""
        more = self.draw.randint(4, 14)
        talk.chain += [self.draw.getrandbits(62) for _ in range(more)]
        talk.tokens += more * BLOCK

    def request(self, talk: Conversation | None = None, *, status: int | None = 200) -> Record:
        """A request comes, is decided by the longest match that is not too busy, and answered."""
        made, charge = self.begin(talk)
        self.end(made, charge, status=status)
        return made

    def begin(self, talk: Conversation | None = None) -> tuple[Record, Charge]:
        talk = self.draw.choice(self.talks) if talk is None else talk
        self.grow(talk)
        decision = self._decide(talk, f"{self.draw.getrandbits(64):016x}")
        made = record(decision, "/v1/chat/completions", [], {"parse": 0.04, "tokenize": 0.21, "lookup": 0.012})
        made.at = self.wall()
        self.decisions.add(made)
        self.history.decided(made, decision)
        hit = decision.chosen.predicted_hit(talk.tokens, BLOCK)
        name = decision.chosen.name
        self.recent = {each: count * 0.97 for each, count in self.recent.items()}
        self.recent[name] = self.recent.get(name, 0.0) + 1.0
        charge = self.load.charge(name, talk.model, hashes=(), start=0, queued_tokens=talk.tokens - hit)
        self._count(talk, decision, hit)
        held = self.held.setdefault(name, {})
        for each in reversed(talk.chain):
            held.pop(each, None)
            held[each] = None
        while len(held) * BLOCK > CACHE_TOKENS:
            held.pop(next(iter(held)))
        self.caches.of(name)
        if name in self.caches.footprints:
            self.caches.footprints[name].holds(len(held) * BLOCK)
        if len(talk.chain) > 160:
            self.talks[self.talks.index(talk)] = self.talk(talk.model)
        return made, charge

    def end(self, made: Record, charge: Charge, *, status: int | None = 200) -> None:
        tokens = made.prompt_tokens or 0
        hit = max(0, made.kept[0].predicted_hit(tokens, BLOCK) - (16 if self.draw.random() < 0.05 else 0))
        if status is not None:
            made.answered(status)
        if status == 200:
            made.first_byte(0.018 + (tokens - hit) / PREFILL_RATE * self.draw.uniform(0.9, 1.5))
            if self.reports:
                made.usage(tokens, hit)
            charge.release()
        else:
            charge.cancel()
        made.is_over = True
        self.history.ended(made)

    def _count(self, talk: Conversation, decision: Decision, hit: int) -> None:
        """What became of the prompt's tokens, for the ladder. Whatever was seen and is nowhere was evicted here."""
        best = max(each.predicted_hit(talk.tokens, BLOCK) for each in decision.candidates)
        seen = 0
        while seen < len(talk.chain) and talk.chain[seen] in self.seen:
            seen += 1
        evicted = max(0, seen * BLOCK - best)
        counts = {"requests": 1, "prompt": talk.tokens, "beyond": talk.tokens - best, "sampled": talk.tokens - best}
        counts |= {"sampled_blocks": len(talk.chain), "sampled:evicted": evicted, "lost:busier": best - hit}
        counts |= {"reported_requests": 1, "reported_prompt": talk.tokens, "reported_predicted": hit, "reported": hit}
        for key, tokens in counts.items():
            self.tally.add(key, tokens)
        if evicted:
            step = excess_step(200_000)
            self.tally.excess[step] = self.tally.excess.get(step, 0.0) + evicted
        self.seen.update(dict.fromkeys(talk.chain))

    def ladder(self) -> Ladder:
        return of(self.tally)

    def _decide(self, talk: Conversation, identity: str) -> Decision:
        request = SchedulingRequest(
            id=identity, model=talk.model, prompt_tokens=talk.tokens, block_size=BLOCK, chain=talk.chain, prefix=b""
        )
        pods = [pod for pod in self.registry.pods if pod.base_model == talk.model and pod.healthy] or list(
            self.registry.pods
        )
        candidates = [self._candidate(endpoint.name, talk) for pod in pods for endpoint in pod.endpoints]
        scores = {each.name: 100.0 * each.credit / max(1, len(talk.chain)) for each in candidates}
        most = 1.0 + max(self.recent.get(each.name, 0.0) + each.in_flight for each in candidates)
        loads = {
            each.name: 100.0 * (1 - (self.recent.get(each.name, 0.0) + each.in_flight) / most) for each in candidates
        }
        totals = {name: score * 1.5 + loads[name] for name, score in scores.items()}
        ranked = sorted(candidates, key=lambda each: (-totals[each.name], self.draw.random()))
        return Decision(
            request=request,
            candidates=candidates,
            ranked=ranked,
            filtered={},
            scores={"kvcache-aware": scores, "least-loaded": loads},
            totals=totals,
            timings_ms={"kvcache-aware": 0.006, "least-loaded": 0.003},
        )

    def _candidate(self, name: str, talk: Conversation) -> Candidate:
        held, matched = self.held.get(name, {}), 0
        while matched < len(talk.chain) and talk.chain[matched] in held:
            matched += 1
        trust: Trust = self.caches.trust.get(name, "exact")
        return Candidate(
            name=name,
            url="http://10.0.0.1",
            rank=EndpointName.parse(name).rank,
            trust=trust,
            engine_block=16,
            matched_blocks=None if trust == "none" else matched,
            in_flight=self.load.in_flight(name),
            running=self.load.in_flight(name),
            waiting=0,
            condition=Condition(prefill_rate=PREFILL_RATE, cache_tokens=CACHE_TOKENS),
        )

    def hour(self, per_minute: int = 30) -> None:
        """Let an hour pass, up to now."""
        while self.shift < 0:
            busy = 1.0 + 0.5 * self.draw.random() + (0.8 if -1_900 < self.shift < -1_300 else 0.0)
            for _ in range(int(per_minute / 4 * busy)):
                self.request(status=200 if self.draw.random() > 0.003 else 502)
            self.shift = min(0.0, self.shift + 15.0)
        for name in self.names:
            self.measure(name, running=self.load.in_flight(name))

    async def live(self, every: float = 0.05) -> None:
        """Traffic until this is cancelled."""
        while True:
            if len(self.going) > 5:
                self.end(*self.going.popleft())
            self.going.append(self.begin())
            for name in self.names:
                self.measure(name, running=self.load.in_flight(name), usage=min(1.0, self.load.in_flight(name) / 10))
            await asyncio.sleep(every)

    @asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        """The admin listener; its base URL."""
        about = About(version="1.2.3", api="http://127.0.0.1:8080", decisions_kept=1_000)
        live = Live(self.fleet(), self.history, self.decisions, lambda: about, self.clock, self.wall)
        pages = Dashboard(live, Examination(lambda: self.config, command=self.doctor), self.draining)
        limits, metrics = LimitsConfig(), Metrics()
        bodies = Bodies(limits, Memory(limits.memory_bytes), Intervals(10.0, time.monotonic))
        admin = Admin(
            cast("Router", None),
            self.registry,
            self.decisions,
            FeedReports({}, self.caches),
            self.outliers,
            Parity(metrics, time.monotonic),
            bodies,
        )
        routes = {**admin.routes(), **pages.routes(), **LadderPage(lambda _: self.ladder()).routes()}
        async with Listener("127.0.0.1", 0, guarded(routes, ()), self.draining) as listener:
            yield listener.url
            self.draining.set()  # as a gateway does: streams end by themselves
