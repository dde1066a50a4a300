"""One gateway in a replay: the real feeds, ledgers, index, candidates, scheduler and accounts, without HTTP."""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from matrixinfer.blocks import BlockChain
from matrixinfer.config import OutliersConfig, PodConfig, PodWatchConfig, SchedulerConfig
from matrixinfer.index.ends import Rule
from matrixinfer.kvevents.footprint import Footprint
from matrixinfer.kvevents.subscription import HEARTBEAT_SECONDS
from matrixinfer.pods.outliers import Outliers
from matrixinfer.pods.registry import EngineMetrics, PodRegistry, ServedNames
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.openai import COMPLETIONS_PATH
from matrixinfer.routing.candidates import Candidates
from matrixinfer.routing.embedded_index import Index, Replay
from matrixinfer.routing.holdings import Matches, charge
from matrixinfer.routing.lookup import Lookup
from matrixinfer.routing.prepared import Prepared
from matrixinfer.routing.sizing import Sizing
from matrixinfer.scheduler.framework import SchedulingRequest, Services
from matrixinfer.scheduler.plugin_loader import discover
from matrixinfer.scheduler.scheduler import Scheduler
from matrixinfer.study.jobs import Frame, Job, Router
from matrixinfer.study.rivals import Pick
from matrixinfer.study.trace import LetterBlocks
from matrixinfer.traffic.load import Charge, LoadLedger
from matrixinfer.traffic.peers.announcements import Announcements
from matrixinfer.traffic.peers.loads import PeerLoads
from matrixinfer.traffic.peers.message import Load, decode
from matrixinfer.trust.cache_views import Caches, CacheView

MODEL = "model"
_PROMPT = Prompt(
    path=COMPLETIONS_PATH,
    model=MODEL,
    stream=True,
    chat=None,
    text="",
    token_ids=None,
    add_special_tokens=False,
    cache_salt=None,
    size=0,
    prefix=b"",
)


class Ticket(NamedTuple):
    """What a gateway holds of a request in flight."""

    request: SchedulingRequest
    is_exact: bool
    """Whether the events of its pod said all that was cached there."""
    charge: Charge


class LetterCaches:
    """Cache views in tokens: the events speak of blocks of one letter, which stands for `block_size` tokens.

    Views are kept until something is applied to the feed of their pod.
    """

    def __init__(self, caches: Caches, block_size: int) -> None:
        self._caches = caches
        self._block_size = block_size
        self._views: dict[str, CacheView | None] = {}

    def changed(self, name: str) -> None:
        """Something has happened to the feed."""
        self._views.pop(name, None)

    def rule_of(self, name: str) -> Rule | None:
        """Engines of one full-attention group have none."""
        return self._caches.rule_of(name)

    def rules_of(self, names: Iterable[str]) -> Mapping[str, Rule]:
        """As for one."""
        return self._caches.rules_of(names)

    def limits_of(self, name: str) -> Sequence[str]:
        """The words of its feed."""
        return self._caches.limits_of(name)

    def of(self, name: str) -> CacheView | None:
        """The view, with the block size of the engine."""
        if name in self._views:
            return self._views[name]
        view = self._caches.of(name)
        if view is not None:
            view = msgspec.structs.replace(
                view, engine_block=self._block_size, footprint=_scaled(view.footprint, self._block_size)
            )
        self._views[name] = view
        return view


def _scaled(footprint: Footprint | None, block_size: int) -> Footprint | None:
    if footprint is None:
        return None
    scaled = Footprint()
    scaled.held_tokens = footprint.held_tokens * block_size
    scaled.most_tokens = footprint.most_tokens * block_size
    scaled.evicted_tokens = footprint.evicted_tokens * block_size
    return scaled


class Gateway(Router):
    """Decides by `pick`, which gets a request and its candidates; None stands for the scheduler with `config`.

    Frames and readings of metrics come in from outside, at the virtual time of `clock`. With `reads` it looks up in the
    index of that gateway, which alone follows the engines.
    """

    def __init__(
        self,
        *,
        name: str,
        config: SchedulerConfig,
        blocks: LetterBlocks,
        block_size: int,
        clock: Callable[[], float],
        seed: int,
        pick: Pick | None = None,
        reads: Gateway | None = None,
        ask: Callable[[str, int], None] = lambda _pod, _start: None,
    ) -> None:
        self._block_size = block_size
        self._clock = clock
        self._ask = ask
        self._pick = pick
        self._writer = reads
        self._index: Index = _index(blocks) if reads is None else reads._index  # noqa: SLF001 - of its own kind
        self._blocks = blocks
        self._frames: deque[Frame] = deque()
        self._asked: set[str] = set()
        self._pods: set[str] = set()
        self._heard: dict[str, float] = {}  # when each pod's last frame came, or it was asked
        self._heartbeats: dict[str, Replay] = {}
        self._ongoing: dict[str, int] = {}  # tokens of the prompts in flight
        self._registry = PodRegistry((), (), PodWatchConfig(), clock)
        known = self._index.known
        own = LetterCaches(known.caches, block_size)
        self._caches: LetterCaches = own if reads is None else reads._caches  # noqa: SLF001 - of its own kind
        lookup = Lookup(self._registry, known.memory, self._caches)
        self._load = LoadLedger(clock, config.pending_seconds)
        self._peers = PeerLoads(name)
        self._announcements = Announcements(name)
        self._load.subscribe(self._announcements.add_in_flight)
        if reads is None:
            known.history.watch_gone(self._load)  # whoever reads a shared index hears of no events
        known.history.subscribe(self._announcements.add_computed)
        self._candidates = Candidates(
            self._registry,
            lookup,
            self._load,
            known.history,
            config.weights,
            Outliers(OutliersConfig(), clock),
            self._peers,
        )
        plugins = discover()
        generator = random.Random(seed)  # noqa: S311  # breaks ties
        self._scheduler = Scheduler(config, Services(clock=clock, rng=generator), plugins, broken=plugins.broken)

    # The fleet

    def join(self, pod: str) -> None:
        """Follow a pod, whose engine has just started."""
        self._registry.join(PodConfig(name=pod, url=f"http://{pod}"))
        served = ServedNames(base_model=MODEL, aliases=frozenset((MODEL,)), adapters={})
        self._registry.learn(pod, served=served, kv_sources=())
        self._registry.answered(pod)
        self._pods.add(pod)
        if self._writer is not None:
            return
        self._index.follow(pod, model=MODEL, can_replay=True)
        self._caches.changed(pod)
        self._ask_if_wanted(pod)

    def leave(self, pod: str) -> None:
        """The pod has gone."""
        self._caches.changed(pod)
        self._registry.leave(pod)
        self._pods.discard(pod)
        self._load.forget(pod)
        self._candidates.forget(pod)
        if self._writer is None:
            self._index.forget(pod)

    def down(self, pod: str) -> None:
        """The engine does not answer any more."""
        for _ in range(PodWatchConfig().unhealthy_after_failures):
            self._registry.failed(pod)
        self._caches.changed(pod)
        if self._writer is None:
            self._index.disconnected(pod)

    def up(self, pod: str) -> None:
        """The engine answers again."""
        self._registry.answered(pod)
        self._caches.changed(pod)
        if self._writer is not None:
            return
        self._index.reconnected(pod)
        self._ask_if_wanted(pod)

    def measured(self, pod: str, metrics: EngineMetrics) -> None:
        """The pod's metrics were read. If it has been silent for long, it is asked for its last frame."""
        self._registry.measured(pod, metrics)
        now = metrics.read_at
        if now - self._heard.setdefault(pod, now) >= HEARTBEAT_SECONDS:
            self._heard[pod] = now
            self.heartbeat(pod)

    # Events

    def heartbeat(self, pod: str) -> None:
        """Ask a silent pod whether its last frames were lost."""
        if self._writer is not None:
            return
        beat = self._index.heartbeat(pod) if pod in self._pods and pod not in self._asked else None
        if beat is not None:
            self._heartbeats[pod] = beat
            self._ask(pod, beat.start)

    def publish(self, frame: Frame) -> None:
        """A frame is on its way. Frames arrive in the order in which they are published."""
        if self._writer is not None:
            return
        self._frames.append(frame)

    def receive(self, now: float) -> None:
        """Apply the frames that have arrived."""
        if self._writer is not None:
            self._writer.receive(now)
            return
        frames, index = self._frames, self._index
        while frames and frames[0].due <= now:
            _, pod, number, payload = frames.popleft()
            if pod in self._pods:
                self._caches.changed(pod)
                self._heard[pod] = now
                index.apply(pod, number, payload)
                self._ask_if_wanted(pod)

    def replayed(self, pod: str, start: int, frames: Sequence[tuple[int, bytes]]) -> None:
        """The engine answers what it was asked for from number `start` on."""
        self._asked.discard(pod)
        if pod not in self._pods:
            return
        self._caches.changed(pod)
        beat = self._heartbeats.pop(pod, None)
        if beat is not None:
            self._index.replayed(beat, [each for each in frames if each[0] >= beat.start])
        wanted = self._index.wanted(pod)
        if wanted is not None and wanted.start >= start:
            self._index.replayed(wanted, [(number, payload) for number, payload in frames if number >= wanted.start])
        self._ask_if_wanted(pod)

    def _ask_if_wanted(self, pod: str) -> None:
        wanted = self._index.wanted(pod)
        if wanted is not None and pod not in self._asked:
            self._asked.add(pod)
            self._ask(pod, wanted.start)

    # Other gateways

    def say(self, now: float) -> bytes | None:
        """The gateway's load, and the prompts that it has sent lately."""
        load = {pod: Load(*each) for pod, each in self._load.loads().items()}
        message = self._announcements.message(load, now)
        if message is not None:
            self._peers.publishes(load)
        return message

    def hear(self, message: bytes) -> None:
        """Count what another gateway has sent."""
        said = decode(message)
        self._peers.update(said.gateway, said.load, self._clock())
        for sent in said.sent:
            view = self._caches.of(sent.endpoint)
            if view is None:
                continue
            self._load.add_pending(sent.endpoint, sent.model, sent.blocks)
            if sent.computed and (sent.by_bytes or view.trust != "exact"):
                self._index.known.history.record_reported(
                    sent.endpoint, sent.model, sent.blocks, by_bytes=sent.by_bytes
                )

    # Requests

    def route(self, job: Job, without: Collection[str] = ()) -> str:
        """Choose a pod for a request, and charge it there."""
        now, known, prompt = self._clock(), self._index.known, job.prompt
        self.receive(now)
        full = prompt // self._block_size
        chain = BlockChain(self._blocks, b"", None, job.hashes[:full])
        request = SchedulingRequest(
            id="",
            model=MODEL,
            prompt_tokens=prompt,
            block_size=self._block_size,
            chain=chain,
            prefix=b"",
            session=job.session,
            now=now,
            chunks=tuple(chain) if self._scheduler.reads_bytes else (),
            chunk_ends=range(self._block_size, prompt + 1, self._block_size) if self._scheduler.reads_bytes else (),
        )
        _, pods = self._registry.resolve(MODEL)
        prepared = Prepared(
            prompt=_PROMPT,
            body=b"",
            request=request,
            pods=[pod for pod in pods if pod.name not in without] or pods,
            matches=Matches(blocks=known.memory.count(MODEL, chain), tails={}),
            base_model=MODEL,
            ids=None,
            tokenizer=None,
            sizing=Sizing(None, prompt, 0, 0, (), 0),
            degraded={},
            timings_ms={},
        )
        candidates = self._candidates.snapshot(prepared)
        if self._pick is None:
            chosen = self._scheduler.schedule(request, candidates).chosen
        else:
            chosen = self._pick(request, candidates, self._ongoing)
        job.predicted = chosen.predicted_hit(prompt, self._block_size)
        job.ticket = Ticket(request, chosen.trust == "exact", charge(self._load, request, chosen))
        self._ongoing[chosen.name] = self._ongoing.get(chosen.name, 0) + prompt
        return chosen.name

    def holds(self, hashes: Sequence[int]) -> dict[str, int]:
        """How many blocks of a prompt each pod holds, by its events. Pods that hold none are absent."""
        return self._index.known.memory.count(MODEL, hashes)

    def answered(self, job: Job) -> None:
        """The answer begins."""
        _ticket(job).charge.first_byte()

    def ended(self, job: Job) -> None:
        """The answer is complete."""
        ticket = _ticket(job)
        self._ongoing[job.pod] -= job.prompt
        ticket.charge.release()
        request = ticket.request
        self._index.known.history.computed(
            job.pod, MODEL, request.chain, is_exact=ticket.is_exact, chunks=request.chunks
        )

    def failed(self, job: Job) -> None:
        """The pod has not computed the prompt, or broke off."""
        self._ongoing[job.pod] -= job.prompt
        _ticket(job).charge.cancel()


def _index(blocks: LetterBlocks) -> Index:
    made = Index(block_size=1)
    made.known = dataclasses.replace(made.known, blocks=blocks)
    return made


def _ticket(job: Job) -> Ticket:
    if not isinstance(job.ticket, Ticket):
        raise TypeError("expected a request that a gateway has routed")
    return job.ticket
