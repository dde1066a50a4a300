"""The decision path with everything real but the sockets. Prompts are token ids, so no tokenizer is needed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import pytest

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config import (
    ModelConfig,
    PodConfig,
    PodWatchConfig,
    SchedulerConfig,
    TokenizationConfig,
)
from matrixinfer.errors import IndexUnavailable, InvalidRequest, NoPodAvailable, UnknownModel
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents import limits
from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.wire import decode
from matrixinfer.pods.publishers import KvSource
from matrixinfer.pods.registry import EngineMetrics, PodRegistry, RankMetrics, ServedNames
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.routing.in_flight import InFlight
from matrixinfer.sim.events import BlockStored, EventBatch, encode
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.traffic.load import LoadLedger
from matrixinfer.traffic.peers.loads import PeerLoads
from matrixinfer.traffic.peers.message import Load
from matrixinfer.trust import reasons
from tests.unit.kvevents.support import frame, removed, stored

from .support import Dispatcher, Parts

PATH = "/v1/completions"
BLOCK, ENGINE_BLOCK = 4, 8
TOKENS = list(range(40))


class BrokenIndex(MemoryIndex):
    async def match(self, model: str, hashes: Sequence[int]) -> dict[str, int]:
        raise IndexUnavailable("no answer within 20 ms")


@dataclass
class World:
    index: MemoryIndex = field(default_factory=MemoryIndex)
    feeds: dict[str, PodFeed] = field(default_factory=dict)
    load: LoadLedger = field(default_factory=lambda: LoadLedger(time.monotonic, 60.0))
    metrics: Metrics = field(default_factory=Metrics)
    peers: PeerLoads = field(default_factory=PeerLoads)
    history: RoutingHistory = field(default_factory=RoutingHistory)
    blocks: TokenBlockProcessor = field(default_factory=lambda: TokenBlockProcessor(BLOCK))
    models: tuple[ModelConfig, ...] = (ModelConfig(name="m", aliases=("nice",)),)
    config: SchedulerConfig = field(default_factory=SchedulerConfig)
    tokenizers: TokenizerManager | None = None

    def __post_init__(self) -> None:
        configs = [PodConfig(name=name, url=f"http://{name}", kv_events="none") for name in "abc"]
        self.registry = PodRegistry(configs, self.models, PodWatchConfig(), time.monotonic)
        for pod in self.registry.pods:
            served = ServedNames(base_model="m", aliases=frozenset({"m", "also"}), adapters={"lora": "m"})
            self.registry.learn(pod.name, served=served)
            self.registry.answered(pod.name)
            ledger = Ledger(pod=pod.name, model="m", blocks=self.blocks, index=self.index)
            ledger.apply(*decode(frame(stored([1], range(ENGINE_BLOCK)), removed([1]))).events)
            self.feeds[pod.name] = PodFeed(ledger, can_replay=False)
        self.parts = Parts(
            registry=self.registry,
            tokenizers=self.tokenizers or TokenizerManager(self.models, TokenizationConfig(), None),
            blocks=self.blocks,
            feeds=self.feeds,
            index=self.index,
            load=self.load,
            history=self.history,
            peers=self.peers,
            metrics=self.metrics,
            config=self.config,
        )
        self.router = self.parts.router
        self._requests = Dispatcher(self.router)

    async def dispatch(self, body: bytes | None = None, *, request_id: str = "r") -> InFlight:
        return await self._requests.dispatch(PATH, request() if body is None else body, request_id=request_id)

    async def finish(self, dispatched: InFlight) -> None:
        await self._requests.finish(dispatched)

    def holds(self, pod: str, tokens: int, *, model: str = "m", salt: str | None = None) -> None:
        chain = self.blocks.chain(TOKENS[:tokens], salt=salt)
        self.index.add(model, pod, list(chain), None)

    async def explain(self, **body: object) -> dict[str, Any]:
        return await self.router.explain(PATH, request(**body))


def request(**body: object) -> bytes:
    return json.dumps({"model": "m", "prompt": TOKENS, **body}).encode()


def field_of(decision: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {pod: each[name] for pod, each in decision["pods"].items()}


async def test_a_prompt_beyond_the_prefix_that_is_looked_at_is_routed_by_what_fits() -> None:
    world = World(config=SchedulerConfig(max_prefix_tokens=16))
    world.holds("b", 32)
    for feed in world.feeds.values():
        feed.replay_ended()
    sent = await world.dispatch()
    assert sent.decision.chosen.name == "b"
    assert len(sent.decision.request.chain) == 16 // BLOCK
    sent.answered(200)
    sent.first_byte()
    sent.usage(40, 32)
    await world.finish(sent)


async def test_the_pod_that_holds_the_prompt_is_chosen_and_charged() -> None:
    world = World()
    world.holds("b", 32)
    sent = await world.dispatch()
    assert sent.decision.chosen.name == "b"
    assert world.load.in_flight("b") == 1
    assert world.load.queued_tokens("b") == 8
    await world.finish(sent)
    assert world.load.total() == 0


async def test_a_dry_run_says_why_and_changes_nothing() -> None:
    world = World()
    world.holds("b", 32)
    decision = await world.explain()
    assert decision == {**decision, "model": "m", "tokens": 40, "blocks": 10, "chosen": "b"}
    assert decision["ranked"][0] == "b"
    assert sorted(decision["ranked"]) == ["a", "b", "c"]
    assert field_of(decision, "matched_blocks") == {"a": 0, "b": 8, "c": 0}
    assert field_of(decision, "filtered") == {"a": None, "b": None, "c": None}
    assert decision["pods"]["b"]["scores"]["expected-ttft"] == 100.0
    assert field_of(decision, "expected_ms") == {"a": 5.0, "b": 1.0, "c": 5.0}
    assert set(decision["timings_ms"]) >= {"parse", "match", "schedule", "expected-ttft"}
    assert world.load.total() == 0
    assert json.loads(json.dumps(decision)) == decision


@pytest.mark.parametrize(("held", "predicted"), [(40, 32), (36, 32), (32, 32), (28, 24), (4, 0)], ids=str)
async def test_the_prediction_is_whole_engine_blocks_and_never_the_last_token(held: int, predicted: int) -> None:
    world = World()
    world.holds("a", held)
    assert field_of(await world.explain(), "predicted_hit_tokens")["a"] == predicted


async def test_the_next_request_sees_what_this_one_brings() -> None:
    world = World()
    sent = await world.dispatch()
    pod = sent.decision.chosen.name
    decision = await world.explain()
    assert field_of(decision, "pending_blocks")[pod] == 10
    assert field_of(decision, "in_flight")[pod] == 1


async def test_a_computed_prompt_is_pending_for_a_while_and_a_refused_one_is_not() -> None:
    for computed in (True, False):
        world = World()
        sent = await world.dispatch()
        if computed:
            sent.first_byte()
        await world.finish(sent)
        assert sum(field_of(await world.explain(), "pending_blocks").values()) == (10 if computed else 0)


async def test_a_move_takes_the_charge_along() -> None:
    world = World()
    world.holds("a", 40)
    sent = await world.dispatch()
    other = sent.decision.ranked[1]
    sent.move(other)
    assert (world.load.in_flight("a"), world.load.in_flight(other.name)) == (0, 1)
    assert world.load.queued_tokens(other.name) == 40
    await world.finish(sent)
    assert world.load.total() == 0


async def test_a_pod_without_a_feed_is_unknown_and_not_empty() -> None:
    world = World()
    del world.feeds["c"]
    assert field_of(await world.explain(), "matched_blocks") == {"a": 0, "b": 0, "c": None}


async def test_a_prompt_that_cannot_be_tokenized_is_routed_by_load() -> None:
    world = World()
    await world.dispatch(request(prompt="text"))
    decision = await world.explain(prompt="text")
    assert decision["tokens"] is None
    assert decision["blocks"] == 0
    assert any("not tokenized" in note for note in decision["notes"])
    busy = next(pod for pod, count in field_of(decision, "in_flight").items() if count)
    assert decision["chosen"] != busy
    assert b'matrixinfer_degraded_total{reason="tokenize"} 1.0' in world.metrics.render()


async def test_an_index_that_does_not_answer_degrades_the_decision() -> None:
    world = World(index=BrokenIndex())
    decision = await world.explain()
    assert field_of(decision, "matched_blocks") == {"a": None, "b": None, "c": None}
    assert "index unavailable: no answer within 20 ms" in decision["notes"]
    await world.finish(await world.dispatch())


async def test_salts_and_adapters_are_namespaces_of_their_own() -> None:
    world = World()
    world.holds("a", 40)
    world.holds("b", 40, salt="s")
    world.holds("c", 40, model="lora")
    assert (await world.explain())["chosen"] == "a"
    assert (await world.explain(cache_salt="s"))["chosen"] == "b"
    assert (await world.explain(model="lora"))["chosen"] == "c"


async def test_stale_metrics_are_unknown() -> None:
    world = World()
    old = time.monotonic() - 60
    world.registry.measured("a", EngineMetrics(running=9, waiting=9, cache_usage=0.5, read_at=old))
    world.registry.measured("b", EngineMetrics(running=1, waiting=0, cache_usage=0.5, read_at=time.monotonic()))
    decision = await world.explain()
    assert field_of(decision, "waiting") == {"a": None, "b": 0, "c": None}
    assert decision["pods"]["a"]["metrics_age_s"] is None


async def test_client_errors_come_before_any_decision() -> None:
    world = World()
    with pytest.raises(InvalidRequest):
        await world.dispatch(b"{")
    with pytest.raises(UnknownModel):
        await world.dispatch(request(model="none"))
    for pod in world.registry.pods:
        world.registry.leave(pod.name)
        world.registry.join(pod.config)
    with pytest.raises(NoPodAvailable):
        await world.dispatch(request(model="none"))
    assert world.load.total() == 0


async def test_an_alias_of_an_adapter_is_asked_for_as_the_adapter() -> None:
    world = World(models=(ModelConfig(name="lora", aliases=("fine",)),))
    sent = await world.dispatch(request(model="fine"))
    assert sent.decision.request.model == "lora"


async def test_engines_that_name_one_model_differently_are_matched_under_their_own_names() -> None:
    world = World()
    world.registry.learn("b", served=ServedNames(base_model="n", aliases=frozenset({"n", "also"}), adapters={}))
    world.holds("b", 40, model="n")
    decision = await world.explain(model="also")
    assert field_of(decision, "matched_blocks") == {"a": 0, "b": 10, "c": 0}
    assert decision["chosen"] == "b"


async def test_a_feed_that_is_not_complete_is_shown_and_noted() -> None:
    world = World()
    world.feeds["a"].live(0, encode(EventBatch(ts=0.0, events=[])))
    decision = await world.explain()
    assert field_of(decision, "feed") == {"a": "complete", "b": "partial", "c": "partial"}
    assert "expected-ttft: what the index says of 2 of 3 pods is partial" in decision["notes"]


async def test_what_an_untrusted_pod_holds_is_unknown_not_nothing() -> None:
    world = World()
    pages = ["BlockStored", [hash(tuple(TOKENS[:4]))], None, TOKENS[:4], 4, None]
    world.feeds["a"].live(0, msgspec.msgpack.encode([0.0, [pages]]))
    decision = await world.explain()
    assert field_of(decision, "matched_blocks") == {"a": None, "b": 0, "c": 0}
    assert field_of(decision, "feed")["a"] == "untrusted"


async def test_a_decision_says_in_words_why_a_pod_is_not_known_exactly() -> None:
    world = World()
    world.feeds["a"].live(0, encode(EventBatch(ts=0.0, events=[])))
    world.feeds["b"].live(0, encode(EventBatch(ts=0.0, events=[])))
    world.feeds["b"].remarks.note(limits.MISFITS)
    del world.feeds["c"]
    said = {"a": [], "b": [limits.MISFITS], "c": [reasons.UNFOLLOWED]}
    assert field_of(await world.explain(), "limits") == said
    await world.dispatch()
    (kept,) = world.parts.decisions.newest()
    assert field_of(kept.view(), "limits") == said


async def test_the_state_of_a_feed_can_be_asked_for() -> None:
    world = World()
    del world.feeds["c"]
    a, _, c = world.registry.pods
    assert world.parts.feed_reports.of(a) == {
        "a": {
            "state": "partial",
            "trust": "partial",
            "limits": [reasons.HISTORY],
            "untrusted": None,
            "hides_salts": False,
            "frames": 0,
            "engine_blocks": 0,
            "engine_block": ENGINE_BLOCK,
            "reuse_unit": ENGINE_BLOCK,
            "drop_tokens": 0,
            "reuse": 1.0,
        }
    }
    assert world.parts.feed_reports.of(c) == {}


SOURCE = KvSource(endpoint="tcp://b:1")


def ranked(*held: int) -> World:
    """A fleet in which the pod `b` has data-parallel ranks that hold so many tokens each."""
    world = World()
    world.registry.learn("b", kv_sources=tuple(replace(SOURCE, rank=rank) for rank in range(len(held))))
    for rank, tokens in enumerate(held):
        world.feeds[f"b@dp{rank}"] = world.feeds["b"]
        world.holds(f"b@dp{rank}", tokens)
    return world


async def test_every_rank_is_a_candidate_of_its_own() -> None:
    world = ranked(8, 32)
    decision = await world.explain()
    assert field_of(decision, "matched_blocks") == {"a": 0, "b@dp0": 2, "b@dp1": 8, "c": 0}
    assert decision["chosen"] == "b@dp1"
    assert list(world.parts.feed_reports.of(world.registry.pods[1])) == ["b@dp0", "b@dp1"]


async def test_the_chosen_rank_is_charged_and_its_pod_is_reported() -> None:
    world = ranked(8, 32)
    sent = await world.dispatch()
    chosen = sent.decision.chosen
    assert (chosen.name, chosen.pod, chosen.rank, chosen.url) == ("b@dp1", "b", 1, "http://b")
    assert (world.load.in_flight("b@dp1"), world.load.in_flight("b@dp0")) == (1, 0)
    sent.failed("connect")
    assert world.registry.pods[1].failures == 1
    sent.answered(503)
    assert world.registry.pods[1].failures == 1
    sent.answered(400)
    assert world.registry.pods[1].failures == 0
    await world.finish(sent)
    assert world.load.total() == 0


async def test_a_pod_that_cannot_be_reached_is_tried_once_however_many_ranks_it_has() -> None:
    sent = await ranked(8, 32, 16).dispatch()
    assert len(sent.decision.ranked) == 5
    first, *others = sent.decision.attempts
    assert first.name == "b@dp1"
    assert sorted(other.name for other in others) == ["a", "c"]


async def test_a_rank_has_the_load_that_the_engine_reports_for_it() -> None:
    world = ranked(8, 8)
    ranks = {0: RankMetrics(running=5, waiting=1), 1: RankMetrics(running=0, waiting=0)}
    whole = EngineMetrics(running=5, waiting=1, cache_usage=None, read_at=time.monotonic(), ranks=ranks)
    world.registry.measured("b", whole)
    assert field_of(await world.explain(), "waiting") == {"a": None, "b@dp0": 1, "b@dp1": 0, "c": None}
    world.registry.measured("b", replace(whole, ranks={}))
    assert field_of(await world.explain(), "waiting") == {"a": None, "b@dp0": None, "b@dp1": None, "c": None}


@pytest.mark.parametrize(("prompt", "hit"), [(TOKENS, 12), ([*TOKENS[:10], 99, 99, 99], 6), (TOKENS[:13], 12)])
async def test_where_engine_blocks_straddle_token_blocks_the_tail_decides(prompt: list[int], hit: int) -> None:
    world = World()
    world.feeds["b"].ledger.reset()
    event = BlockStored(
        block_hashes=[1, 2], parent_block_hash=None, token_ids=TOKENS[:12], block_size=6, extra_keys=[None, None]
    )
    world.feeds["b"].live(0, encode(EventBatch(ts=0.0, events=[event])))
    decision = await world.explain(prompt=prompt)
    assert field_of(decision, "predicted_hit_tokens")["b"] == hit


async def test_a_dry_run_is_not_counted() -> None:
    world = World(index=BrokenIndex())
    before = world.metrics.render()
    await world.explain(prompt="text")
    await world.explain()
    assert world.metrics.render() == before


async def test_pods_that_filters_removed_are_the_last_resort() -> None:
    world = World()
    metrics = EngineMetrics(running=9, waiting=99, cache_usage=0.5, read_at=time.monotonic())
    world.registry.measured("a", metrics)
    decision = (await world.dispatch()).decision
    assert [pod.name for pod in decision.attempts][-1] == "a"
    assert "a" in decision.filtered
    assert sorted(pod.name for pod in decision.attempts) == ["a", "b", "c"]


async def computed(world: World, **body: object) -> str:
    """Send a request that is computed; returns its pod."""
    sent = await world.dispatch(request(**body))
    sent.first_byte()
    await world.finish(sent)
    return sent.decision.chosen.name


async def test_recent_blocks_count_where_a_feed_is_partial() -> None:
    world = World(load=LoadLedger(time.monotonic, 0.0))
    pod = await computed(world)
    decision = await world.explain()
    assert field_of(decision, "trust") == dict.fromkeys("abc", "partial")
    assert field_of(decision, "recent_blocks") == {**dict.fromkeys("abc", 0), pod: 10}
    assert (decision["chosen"], field_of(decision, "credit")[pod]) == (pod, 7.5)
    world.holds(pod, 16)
    assert field_of(await world.explain(), "credit")[pod] == 4 + 0.75 * 6
    assert field_of(await world.explain(model="lora"), "recent_blocks") == dict.fromkeys("abc", 0)


async def test_recent_blocks_are_forgotten_once_the_feed_is_exact() -> None:
    world = World(load=LoadLedger(time.monotonic, 0.0))
    pod = await computed(world)
    world.feeds[pod].live(0, encode(EventBatch(ts=0.0, events=[])))
    world.holds(pod, 16)
    decision = await world.explain()
    assert (field_of(decision, "trust")[pod], field_of(decision, "recent_blocks")[pod]) == ("exact", 0)
    assert pod in world.history
    assert await computed(world) == pod
    assert pod not in world.history


async def test_a_request_that_was_not_computed_leaves_nothing_behind() -> None:
    world = World(load=LoadLedger(time.monotonic, 0.0))
    sent = await world.dispatch()
    await world.finish(sent)
    assert len(world.history) == 0


async def test_blocks_on_a_slower_tier_count_for_less_than_those_on_the_device() -> None:
    world = World()
    for pod in "ab":
        world.feeds[pod].live(0, encode(EventBatch(ts=0.0, events=[])))
        world.feeds[pod].ledger.tiers.open(1, lambda _: [])
        world.holds(pod, 32)
    world.holds("b~device", 32)
    decision = await world.explain()
    assert field_of(decision, "tiers") == {"a": [0], "b": [8], "c": []}
    assert field_of(decision, "credit") == {"a": pytest.approx(6.4), "b": 8, "c": 0}
    assert decision["chosen"] == "b"


async def test_nothing_stays_behind_when_an_answer_ends_after_its_pod_has_left() -> None:
    world = World(load=LoadLedger(time.monotonic, 60.0))
    world.holds("b", 32)
    sent = await world.dispatch()
    assert sent.decision.chosen.name == "b"
    world.registry.leave("b")
    world.router.forget("b")
    decision = await world.explain()
    assert sorted(decision["pods"]) == ["a", "c"]
    sent.first_byte()
    sent.usage(40, 8)
    assert b'pod="b"' in world.metrics.render()
    await world.finish(sent)
    assert b'pod="b"' not in world.metrics.render()
    assert (len(world.history), len(world.load), len(world.parts.drift)) == (0, 0, 0)


async def test_decisions_are_kept_with_what_came_of_them() -> None:
    world = World()
    sent = await world.dispatch(request(), request_id="r-1")
    first, second = sent.decision.attempts[:2]
    sent.failed("connect")
    sent.move(second)
    sent.answered(200)
    sent.usage(40, 8)
    (record,) = world.parts.decisions.newest(request_id="r-1")
    assert (record.attempts, record.status, record.counted, record.cached) == ([first.name, second.name], 200, 40, 8)


async def test_what_other_gateways_have_in_flight_counts() -> None:
    world = World()
    world.peers.update("x", {"a": Load(40, 1_000), "c": Load(1, 50)}, time.monotonic())
    sent = await world.dispatch()
    assert sent.decision.chosen.name == "b"
    decision = await world.explain()
    assert field_of(decision, "in_flight") == {"a": 40, "b": 1, "c": 1}
    assert field_of(decision, "peers_in_flight") == {"a": 40, "b": 0, "c": 1}
    assert decision["pods"]["a"]["filtered"] is not None
    assert [pod.queued_tokens for pod in sent.decision.candidates] == [1_000, 0, 50]


async def test_what_another_gateway_sends_is_pending() -> None:
    world = World()
    world.load.add_pending("c", "m", list(world.blocks.chain(TOKENS)))
    decision = await world.explain()
    assert (decision["chosen"], decision["pods"]["c"]["pending_blocks"]) == ("c", 10)


class Fault(Exception):
    pass


def fails(*_: object, **__: object) -> Any:
    raise Fault


def exact_world() -> World:
    """Every pod's feed is complete and holds the first 32 tokens, so that a hit is predicted and watched."""
    world = World()
    stored = BlockStored(
        block_hashes=[1, 2, 3, 4], parent_block_hash=None, token_ids=TOKENS[:32], block_size=8, extra_keys=None
    )
    for feed in world.feeds.values():
        feed.live(0, encode(EventBatch(ts=0.0, events=[stored])))
    return world


@pytest.mark.parametrize(
    "part",
    ["router._auditor._comparison", "router._auditor._prediction", "router._metrics.decided", "parts.drift.awaits"],
)
@pytest.mark.parametrize("answers", [True, False])
async def test_a_fault_in_any_part_leaves_no_charge_and_no_watch(part: str, answers: bool) -> None:
    world = exact_world()
    *path, name = part.split(".")
    owner: Any = world
    for each in path:
        owner = getattr(owner, each)
    setattr(owner, name, fails)

    async def handle() -> None:
        async with world.router.dispatch(PATH, request(), request_id="r") as sent:
            if answers:
                sent.first_byte()
                sent.usage(40, 32)
            fails()

    with pytest.raises(Fault):
        await handle()
    assert world.load.total() == 0
    assert not any(feed.ledger.supports.watched for feed in world.feeds.values())


async def test_a_subscriber_that_fails_at_a_charge_leaves_none() -> None:
    world = World()
    world.load.subscribe(fails)
    with pytest.raises(Fault):
        await world.dispatch()
    assert (world.load.total(), len(world.load)) == (0, 0)
