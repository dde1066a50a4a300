"""Prompts whose token ids are only partly known: they stay together by their bytes, and weigh what they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config import ModelConfig, PodConfig, PodWatchConfig, SchedulerConfig, TokenizationConfig
from matrixinfer.errors import TokenizeError
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.pods.registry import PodRegistry, ServedNames
from matrixinfer.prompt.base import Prompt, Tokenized, Tokens
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.remote import Engine
from matrixinfer.routing.in_flight import InFlight
from matrixinfer.scheduler.framework import Candidate
from matrixinfer.scheduler.policies import with_policy

from .support import Dispatcher, Parts

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
WORDS = "word " * 400
BLOCK = 16


class Partly(TokenizerManager):
    """Knows the first `known` ids of a chat, or none of them (None)."""

    def __init__(self, known: int | None, source: Any = "local", *, complete: bool = False) -> None:
        super().__init__((), TokenizationConfig(), None)
        self.known, self.source, self.complete = known, source, complete

    async def tokenize(
        self, prompt: Prompt, *, model: str, engines: Sequence[Engine], may_be_late: bool = False
    ) -> Tokenized:
        if prompt.token_ids is not None:
            return Tokenized(tokens=Tokens(ids=prompt.token_ids), source="request")
        if self.known is None:
            raise TokenizeError("no tokenizer")
        ids = np.arange(self.known, dtype=np.uint32)
        return Tokenized(tokens=Tokens(ids=ids, complete=self.complete), source=self.source)


@dataclass
class World:
    tokenizers: Partly = field(default_factory=lambda: Partly(0))
    policy: str = "kv_aware"
    is_exact: bool = True
    stores: bool = False
    """Engines publish the known blocks."""
    now: float = 0.0

    def __post_init__(self) -> None:
        names = ("a", "b", "c", "d")
        configs = [PodConfig(name=name, url=f"http://{name}", kv_events="none") for name in names]
        self.registry = PodRegistry(configs, (ModelConfig(name="m"),), PodWatchConfig(), lambda: self.now)
        self.index, self.blocks = MemoryIndex(), TokenBlockProcessor(BLOCK)
        self.feeds: dict[str, PodFeed] = {}
        for pod in self.registry.pods:
            self.registry.learn(pod.name, served=ServedNames(base_model="m", aliases=frozenset({"m"}), adapters={}))
            self.registry.answered(pod.name)
            ledger = Ledger(pod=pod.name, model="m", blocks=self.blocks, index=self.index)
            ledger.block_size = BLOCK
            feed = self.feeds[pod.name] = PodFeed(ledger, can_replay=self.is_exact)
            if self.is_exact:
                feed.replay_ended()
                while feed.catch_up():
                    pass
        self.parts = Parts(
            registry=self.registry,
            tokenizers=self.tokenizers,
            blocks=self.blocks,
            feeds=self.feeds,
            index=self.index,
            clock=lambda: self.now,
            config=with_policy(SchedulerConfig(), self.policy),
        )
        self.requests = Dispatcher(self.parts.router)

    async def sent(self, body: object, path: str = CHAT) -> InFlight:
        return await self.requests.dispatch(path, json.dumps(body).encode())

    async def answered(self, request: InFlight, *, prompt_tokens: int | None = None) -> None:
        request.first_byte()
        if prompt_tokens is not None:
            request.usage(prompt_tokens, None)
        await self.requests.finish(request)

    async def turn(self, body: object, path: str = CHAT) -> str:
        request = await self.sent(body, path)
        await self.answered(request)
        if self.stores:
            self.index.add("m", request.pod.name, list(request.decision.request.chain), None)
        self.now += 3.0
        return request.pod.name

    async def explain(self, body: object) -> dict[str, Any]:
        return await self.parts.router.explain(CHAT, json.dumps(body).encode())


def chat(*contents: object) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"model": "m", "messages": [{"role": roles[i % 2], "content": each} for i, each in enumerate(contents)]}


def image(data: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


async def moves(world: World, first: Sequence[Any], *, conversations: int = 8, turns: int = 4) -> int:
    """How often conversations change their pod; each begins with its own number and `first`."""
    moved, last = 0, dict[int, str]()
    contents: dict[int, list[Any]] = {n: [[text(f"{n}"), *first]] for n in range(conversations)}
    for number in range(turns):
        for n, each in contents.items():
            pod = await world.turn(chat(*each))
            moved += n in last and last[n] != pod
            last[n] = pod
            each += ["ok", f"and then {number}?"]
    return moved


@pytest.mark.parametrize("policy", ["kv_aware", "cache_aware"])
@pytest.mark.parametrize("known", [None, 0, 20])
@pytest.mark.parametrize("is_exact", [True, False])
async def test_a_conversation_that_begins_with_an_image_keeps_its_pod(
    policy: str, known: int | None, is_exact: bool
) -> None:
    world = World(Partly(known), policy=policy, is_exact=is_exact, stores=is_exact)
    assert await moves(world, [image("AAAA"), text(WORDS)]) == 0


async def test_conversations_whose_images_differ_are_told_apart() -> None:
    world = World()
    same = [await world.turn(chat([image("AAAA"), text(WORDS)])) for _ in range(3)]
    assert len(set(same)) == 1
    decision = await world.explain(chat([image("BBBB"), text(WORDS)]))
    assert {pod["recent_chunks"] for pod in decision["pods"].values()} == {0}


async def test_equal_prompts_in_flight_go_to_one_pod() -> None:
    world = World(policy="cached_share")
    requests = [await world.sent(chat([image("AAAA"), text(WORDS)])) for _ in range(3)]
    assert len({request.pod.name for request in requests}) == 1
    for request in requests:
        await world.requests.finish(request)  # no answer: nothing is left of them
    decision = await world.explain(chat([image("AAAA"), text(WORDS)]))
    assert {pod["recent_chunks"] for pod in decision["pods"].values()} == {0}


def candidate(world: World, request: InFlight, name: str) -> Candidate:
    return next(each for each in request.decision.candidates if each.name == name)


async def test_bytes_count_beyond_the_known_tokens_only_where_those_are_held() -> None:
    world = World(Partly(40))
    body = chat([text("t" * 160), image("AAAA"), text(WORDS)])
    pod = await world.turn(body)
    request = await world.sent(body)
    seen = candidate(world, request, pod)
    assert seen.recent_chunks > 0
    assert (seen.matched_blocks, seen.guessed_tokens, seen.credit) == (0, 0, 0)  # its events say that it holds nothing
    await world.requests.finish(request)
    world.index.add("m", pod, list(world.blocks.chain(np.arange(40, dtype=np.uint32))), None)
    request = await world.sent(body)
    seen, scheduled = candidate(world, request, pod), request.decision.request
    assert (seen.matched_blocks, request.pod.name) == (2, pod)
    assert 900 < seen.guessed_tokens <= scheduled.unknown_tokens
    assert seen.credit == pytest.approx(2 + 0.75 * seen.guessed_tokens / BLOCK)
    await world.requests.finish(request)


@pytest.mark.parametrize(
    ("engine_block", "held", "counts"), [(32, 2, True), (32, 1, False), (24, 1, True), (64, 0, True)]
)
async def test_only_whole_engine_blocks_of_known_tokens_must_be_held(
    engine_block: int, held: int, counts: bool
) -> None:
    world = World(Partly(40))  # the engine block that the image begins in is never indexed
    body = chat([text("t" * 160), image("AAAA"), text(WORDS)])
    pod = await world.turn(body)
    ledger = world.feeds[pod].ledger
    ledger.block_size, ledger.changes = engine_block, ledger.changes + 1
    world.index.add("m", pod, list(world.blocks.chain(np.arange(40, dtype=np.uint32)))[:held], None)
    decision = await world.explain(body)
    assert (decision["pods"][pod]["guessed_hit_tokens"] > 0) == counts


async def test_what_the_engine_has_lost_is_not_guessed() -> None:
    world = World()
    body = chat([image("AAAA"), text(WORDS)])
    pod = await world.turn(body)
    world.parts.history.forget(pod)
    decision = await world.explain(body)
    assert decision["pods"][pod]["recent_chunks"] == 0


async def test_a_prompt_with_exact_ids_is_not_cut_nor_remembered_by_bytes() -> None:
    world = World(Partly(400, complete=True))
    await world.turn(chat(WORDS))
    request = await world.sent(chat(WORDS))
    scheduled = request.decision.request
    assert (scheduled.chunks, scheduled.unknown_tokens, scheduled.other_tokens) == ((), 0, 0)
    assert "bytes" not in request.prepared.timings_ms
    assert world.parts.history.chunks == 0
    await world.requests.finish(request)


async def test_ids_of_an_engine_may_be_missing_on_the_next_turn() -> None:
    world = World(Partly(400, "remote", complete=True))
    pods = {await world.turn(chat(WORDS))}
    world.tokenizers.known = None
    pods |= {await world.turn(chat(WORDS, "ok", f"and {i}?")) for i in range(4)}
    assert len(pods) == 1


async def test_a_salt_or_a_prompt_that_reads_no_cache_shares_nothing() -> None:
    world = World()
    body = chat([image("AAAA"), text(WORDS)])
    await world.turn(body)
    for different in ({**body, "cache_salt": "s"}, {**body, "prompt_logprobs": 1}):
        decision = await world.explain(different)
        assert {pod["recent_chunks"] for pod in decision["pods"].values()} == {0}


@pytest.mark.parametrize(
    ("known", "content", "tokens"),
    [
        (None, "x" * 40_000, 10_000),
        (5, [image("AAAA"), text("x" * 40_000)], 5 + 1000 + 10_000),
        (5, [image("A" * 500_000)], 5 + 1000),
        (5, [image("AAAA"), image("BBBB"), {"type": "input_audio", "input_audio": {"data": "A"}}], 5 + 2500),
        (2000, [text("x" * 8_000), image("AAAA"), text("x" * 400)], 2000 + 1000 + 100),
    ],
)
async def test_the_load_of_what_is_unknown_is_estimated(known: int | None, content: object, tokens: int) -> None:
    world = World(Partly(known))
    request = await world.sent(chat(content))
    assert world.parts.router._load.queued_tokens(request.pod.name) == pytest.approx(tokens, abs=90)  # noqa: SLF001
    await world.requests.finish(request)


@pytest.mark.parametrize(
    ("prompts", "tokens"),
    [
        (["x" * 40, "y" * 8000, "z" * 4000], 3000 + 10),
        ([[1, 2, 3], list(range(500)), list(range(700))], 1203),
        ([1, 2, 3], 3),
    ],
)
async def test_a_list_of_prompts_weighs_their_sum(prompts: list[Any], tokens: int) -> None:
    world = World(Partly(10, complete=True))
    request = await world.sent({"model": "m", "prompt": prompts}, COMPLETION)
    assert world.parts.router._load.queued_tokens(request.pod.name) == pytest.approx(tokens, abs=10)  # noqa: SLF001
    await world.requests.finish(request)


async def test_answers_teach_how_large_text_and_media_are() -> None:
    world = World(Partly(0))
    for _ in range(30):
        await world.answered(await world.sent(chat("x" * 8000)), prompt_tokens=4000)
        await world.answered(await world.sent(chat([image("AAAA"), text("x" * 4000)])), prompt_tokens=2250)
    rates = world.parts.sizes.of("m")
    assert rates.bytes_per_token == pytest.approx(2.0, abs=0.1)
    assert rates.medium("image") == pytest.approx(200, abs=60)


async def test_token_ids_and_lists_of_prompts_teach_nothing() -> None:
    world = World(Partly(10, complete=True))
    for prompt in ([1] * 40, ["x" * 40, "y" * 40]):
        await world.answered(await world.sent({"model": "m", "prompt": prompt}, COMPLETION), prompt_tokens=40)
    assert len(world.parts.sizes) == 0


async def test_the_decision_says_what_was_known_by_tokens_and_what_by_bytes() -> None:
    world = World(Partly(20))
    body = chat([text("t" * 80), image("AAAA"), text(WORDS)])
    pod = await world.turn(body)
    world.index.add("m", pod, list(world.blocks.chain(np.arange(20, dtype=np.uint32))), None)
    decision = await world.explain(body)
    chosen = decision["pods"][pod]
    assert (decision["chosen"], decision["tokens"], decision["blocks"]) == (pod, 20, 1)
    assert decision["unknown_tokens"] == pytest.approx(1500, abs=30)
    assert (decision["predicted_hit_tokens"], chosen["predicted_hit_tokens"]) == (16, 16)
    assert decision["chunks"] == chosen["recent_chunks"] > 3
    assert decision["guessed_hit_tokens"] == chosen["guessed_hit_tokens"] > 1200
    assert json.loads(json.dumps(decision)) == decision
