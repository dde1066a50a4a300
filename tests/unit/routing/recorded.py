"""Decisions over captures of engines, made-up fleets and the benchmark's prompts, a line each.

What is recorded says what was decided and on which grounds, so that a change of structure can be distinguished from a change of
behaviour.
"""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from bench.prompts import chat, tokenizer_path
from msgspec import structs

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config import (
    ModelConfig,
    PodConfig,
    PodWatchConfig,
    TokenizationConfig,
)
from matrixinfer.feedtools.capture_file import CaptureReader
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.pods.publishers import KvSource
from matrixinfer.pods.registry import EngineMetrics, PodRegistry, ServedNames
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.openai import CHAT_PATH, COMPLETIONS_PATH
from matrixinfer.routing.in_flight import InFlight
from matrixinfer.scheduler.framework import Candidate
from matrixinfer.sim.events import BlockStored, EventBatch, encode
from matrixinfer.traffic.peers.loads import PeerLoads
from matrixinfer.traffic.peers.message import Load

from .support import Dispatcher, Parts

CAPTURES = Path(__file__).parents[2] / "data" / "captures"
MODEL = "bench"


@dataclass
class Clock:
    now: float = 1_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Gateway:
    """A router over real parts, with a clock that stands still until it is set."""

    pods: Sequence[str]
    block_size: int
    models: tuple[ModelConfig, ...] = ()
    adapters: Mapping[str, str] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.blocks, self.index, self.peers = TokenBlockProcessor(self.block_size), MemoryIndex(), PeerLoads()
        configs = [PodConfig(name=name, url=f"http://{name}", kv_events="none") for name in self.pods]
        self.registry = PodRegistry(configs, self.models, PodWatchConfig(), self.clock)
        self.feeds: dict[str, PodFeed] = {}
        for name in self.pods:
            served = ServedNames(base_model=MODEL, aliases=frozenset({MODEL}), adapters=self.adapters)
            self.registry.learn(name, served=served)
            self.registry.answered(name)
        self.tokenizers = TokenizerManager(self.models, TokenizationConfig(), None)
        self.parts = Parts(
            registry=self.registry,
            tokenizers=self.tokenizers,
            blocks=self.blocks,
            feeds=self.feeds,
            clock=self.clock,
            index=self.index,
            peers=self.peers,
        )
        self.requests = Dispatcher(self.parts.router)

    def feed(self, endpoint: str) -> PodFeed:
        if endpoint not in self.feeds:
            ledger = Ledger(pod=endpoint, model=MODEL, blocks=self.blocks, index=self.index)
            self.feeds[endpoint] = PodFeed(ledger, can_replay=False)
        return self.feeds[endpoint]

    async def dispatch(self, path: str, body: bytes) -> InFlight:
        return await self.requests.dispatch(path, body)

    async def finish(self, request: InFlight, *, computed: bool = True) -> None:
        if computed:
            request.first_byte()
        await self.requests.finish(request)


def line(label: str, request: InFlight) -> str:
    """What was decided, and on which grounds."""
    decision, prompt_tokens = request.decision, request.decision.request.prompt_tokens
    size = decision.request.block_size

    def of(pod: Candidate) -> str:
        grounds = (
            pod.trust,
            pod.matched_blocks,
            pod.matched_tail,
            pod.pending_blocks,
            pod.recent_blocks,
            round(pod.credit, 3),
            pod.predicted_hit(prompt_tokens, size),
            pod.load,
            round(decision.totals.get(pod.name, -1.0), 6),
        )
        return f"{pod.name}={'/'.join(map(str, grounds))}"

    ranked = ">".join(pod.name for pod in decision.ranked)
    return f"{label} {prompt_tokens} {ranked} {' '.join(of(pod) for pod in decision.candidates)}"


async def record() -> AsyncIterator[str]:
    """Every decision, in order."""
    for name, block_size in (("capture", 32), ("capture-lora", 32), ("capture-v028-bs16", 128), ("oracle-bs16", 16)):
        async for each in over_capture(name, block_size):
            yield each
    async for each in over_fleets():
        yield each
    async for each in over_benchmark():
        yield each


async def over_capture(name: str, block_size: int) -> AsyncIterator[str]:
    """The prompts of a capture, among a pod that publishes its events, one that stopped half-way, and one without."""
    rows: list[Mapping[str, Any]] = list(islice(CaptureReader(CAPTURES / f"{name}.jsonl.gz"), 400))
    gateway = Gateway(pods=("a", "b", "c"), block_size=block_size, adapters={"lora-1": MODEL})
    half = len(rows) // 2
    for number, row in enumerate(rows):
        if row["kind"] == "event":
            for pod in "ab" if number < half else "a":
                gateway.feed(pod).live(row["seq"], bytes.fromhex(row["payload_hex"]))
        elif row["kind"] == "request" and row.get("prompt_token_ids"):
            body = {**(row.get("body") or {}), "model": MODEL, "prompt": row["prompt_token_ids"]}
            body.pop("messages", None)
            request = await gateway.dispatch(COMPLETIONS_PATH, json.dumps(body).encode())
            yield line(f"{name}:{row['label']}", request)
            await gateway.finish(request, computed=bool(number % 3))
            gateway.clock.now += 0.4


async def over_fleets() -> AsyncIterator[str]:
    """Seeded fleets of every kind of pod: feeds in all states, ranks, loads, peers, and requests that overlap."""
    for seed in range(40):
        draw = random.Random(seed)
        gateway = Gateway(pods=("a", "b", "c", "d"), block_size=4)
        gateway.registry.learn("d", kv_sources=tuple(KvSource(endpoint="tcp://d:1", rank=rank) for rank in (0, 1)))
        prompt = [draw.randrange(1000) for _ in range(48)]
        for endpoint in ("a", "b", "d@dp0", "d@dp1"):
            _report(gateway.feed(endpoint), prompt[: draw.randrange(0, 49)], draw)
        for pod in "abc":
            if draw.random() < 0.6:
                gateway.registry.measured(
                    pod,
                    EngineMetrics(
                        running=draw.randrange(6),
                        waiting=draw.randrange(3),
                        cache_usage=draw.random(),
                        read_at=gateway.clock(),
                    ),
                )
        if draw.random() < 0.5:
            gateway.peers.update("x", {"a": Load(draw.randrange(8), draw.randrange(500))}, gateway.clock())
        in_flight: list[InFlight] = []
        for turn in range(5):
            tokens = [*prompt[: draw.randrange(8, 49)], *(draw.randrange(1000) for _ in range(draw.randrange(12)))]
            request = await gateway.dispatch(COMPLETIONS_PATH, json.dumps({"model": MODEL, "prompt": tokens}).encode())
            yield line(f"fleet:{seed}.{turn}", request)
            in_flight.append(request)
            if draw.random() < 0.5:
                await gateway.finish(in_flight.pop(draw.randrange(len(in_flight))))
            gateway.clock.now += draw.random()


def _report(feed: PodFeed, tokens: list[int], draw: random.Random) -> None:
    kind = draw.choice(["complete", "partial", "stale", "silent", "untrusted"])
    for seq, event in enumerate(_stored(tokens), start=int(kind == "partial")):
        feed.live(seq, encode(EventBatch(ts=0.0, events=[event])))
    if kind == "stale":
        feed.disconnected()
    elif kind == "silent":
        for _ in range(3):
            feed.heartbeat_missed()
    elif kind == "untrusted":
        odd = structs.replace(next(_stored([0] * 8)), group_idx=1, kv_cache_spec_kind=None)
        feed.live(feed.position or 0, encode(EventBatch(ts=0.0, events=[odd])))


def _stored(tokens: list[int]) -> Iterator[BlockStored]:
    parent = None
    for start in range(0, len(tokens) // 8 * 8, 8):
        block = tokens[start : start + 8]
        yield BlockStored(
            block_hashes=[start + 1], parent_block_hash=parent, token_ids=block, block_size=8, extra_keys=[None]
        )
        parent = start + 1


async def over_benchmark() -> AsyncIterator[str]:
    """The benchmark's conversations, tokenized here, each sent twice to a fleet that holds none of them yet."""
    models = (ModelConfig(name=MODEL, tokenizer=str(tokenizer_path()), chat_template="chatml"),)
    gateway = Gateway(pods=("a", "b", "c", "d"), block_size=128, models=models)
    async with gateway.tokenizers:
        for kib, session in ((1, 0), (8, 1), (8, 2), (64, 3), (8, 1), (64, 3), (1, 0)):
            request = await gateway.dispatch(CHAT_PATH, chat(kib, session))
            yield line(f"bench:{kib}.{session}", request)
            await gateway.finish(request)
            gateway.clock.now += 5.0
