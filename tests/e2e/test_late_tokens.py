"""A gateway that asks its engines for token ids: no decision waits long for them, and they are used when they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Literal

import aiohttp
import pytest

from matrixinfer.app.service import Service
from matrixinfer.config import Config, PodConfig, SchedulerConfig, TokenizationConfig, checked
from matrixinfer.prompt import late
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.model import Timing
from matrixinfer.sim.server import SimEngine
from tests.virtual_time import VirtualTimeLoop

from .fleet import Fleet

pytestmark = pytest.mark.virtual_time

CHAT = "/v1/chat/completions"
SLOW = 0.5
"""Seconds that the engines' `/tokenize` takes."""
ENGINE = SimEngineConfig(
    model="m",
    num_blocks=5_000,
    timing=Timing(step=0.01, prefill_token=0, decode_sequence=0),
    tokenize_seconds=SLOW,
)
LATE = "token ids were not there in time"


@asynccontextmanager
async def gateway(
    loop: VirtualTimeLoop,
    tokenizer: LocalTokenizer,
    engine: SimEngineConfig = ENGINE,
    *,
    pods: int = 2,
    kv_events: Literal["discover", "none"] = "discover",
    **more: Any,
) -> AsyncIterator[Fleet]:
    """A gateway that can only ask, in virtual time."""
    async with (
        SimEngine(engine, tokenizer) as one,
        SimEngine(engine, tokenizer) as two,
        aiohttp.ClientSession() as session,
    ):
        engines = [one, two][:pods]
        config = Config(
            listen="127.0.0.1:0",
            admin="127.0.0.1:0",
            pods=tuple(PodConfig(name=f"pod-{i}", url=each.url, kv_events=kv_events) for i, each in enumerate(engines)),
            tokenization=TokenizationConfig(find="none", **more),
            scheduler=SchedulerConfig(seed=1),
        )
        async with Service(checked(config)) as service:
            target = Fleet(engines=engines, service=service, session=session)
            if kv_events == "none":
                yield target
                return
            await target.settled()
            with loop.hold_while(lambda: not target.is_settled()):
                yield target


def chat(number: int = 0, *, max_tokens: int = 1) -> dict[str, Any]:
    text = f"{number}: " + "The river is long and old, and it flows to the sea. " * 40
    return {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": max_tokens}


async def decisions(target: Fleet) -> list[dict[str, Any]]:
    async with target.session.get(f"{target.service.gateway.admin_url}/debug/decisions") as response:
        found: list[dict[str, Any]] = (await response.json())["decisions"]
        return found


async def parity(target: Fleet) -> dict[str, Any]:
    async with target.session.get(f"{target.service.gateway.admin_url}/debug/tokenizers") as response:
        found: dict[str, Any] = (await response.json())["tokenizers"]["m"]
        return found


async def test_an_answer_does_not_wait_for_a_slow_engine_to_tokenize(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer
) -> None:
    async with gateway(loop, tokenizer) as target:
        began = loop.time()
        answer, _ = await target.post(CHAT, chat())
        assert loop.time() - began < SLOW / 5
        (made,) = await decisions(target)
        assert made["tokens"] is None
        assert made["late"] is None
        assert any(note.startswith(LATE) for note in made["notes"])
        assert await target.metric('matrixinfer_degraded_total{reason="late"}') == 1

        await asyncio.sleep(SLOW)
        (made,) = await decisions(target)
        counted = answer["usage"]["prompt_tokens"]
        assert made["late"] == {"tokens": counted, "blocks": counted // 128, "predicted_hit_tokens": None}
        usage = (await parity(target))["classes"]["chat"]["usage"]
        assert usage == {"agreed": 1, "mismatched": 0, "inconclusive": 0, "streak": 1}
        assert (await parity(target))["asking"]["answers"] == 1


async def test_token_ids_that_came_late_are_there_for_the_same_prompt(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer
) -> None:
    async with gateway(loop, tokenizer) as target:
        _, first = await target.post(CHAT, chat())
        await asyncio.sleep(2 * SLOW)
        decision = await target.explain(CHAT, chat())
        assert decision["tokens"] is not None
        assert decision["chosen"] == first
        assert decision["predicted_hit_tokens"] > 0


async def test_a_request_in_flight_gets_its_blocks_and_its_prediction(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer
) -> None:
    slow = replace(ENGINE, timing=Timing(step=0.01, prefill_token=0.002, decode_sequence=0))
    async with gateway(loop, tokenizer, slow, pods=1) as target:
        under_way = asyncio.create_task(target.post(CHAT, chat()))
        await asyncio.sleep(0.1)
        service = target.service
        chunks = len(service.state.load)  # of the prompt's bytes
        await asyncio.sleep(SLOW)  # the prompt takes about a second
        made = (await decisions(target))[0]
        assert made["late"]["predicted_hit_tokens"] == 0
        assert len(service.state.load) - chunks == made["late"]["blocks"] > 0
        assert service.state.load.queued_tokens("pod-0") == made["late"]["tokens"]
        await under_way
        assert service.state.load.in_flight("pod-0") == service.state.load.queued_tokens("pod-0") == 0
        assert await target.metric('matrixinfer_drift_total{pod="pod-0",result="exact"}') == 1


async def test_what_came_late_is_remembered_where_events_do_not_say(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer
) -> None:
    async with gateway(loop, tokenizer, kv_events="none") as target:
        await target.post(CHAT, chat())
        assert len(target.service.state.history) == 0
        await asyncio.sleep(2 * SLOW)
        assert len(target.service.state.history) == (await decisions(target))[0]["late"]["blocks"] > 0


async def test_a_conversation_stays_where_it_was_while_its_token_ids_are_late(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer
) -> None:
    async with gateway(loop, tokenizer, replace(ENGINE, tokenize_seconds=1.9)) as target:
        homes: dict[int, set[str | None]] = {}
        talks = {number: chat(number) for number in range(6)}
        for _ in range(4):
            for number, body in talks.items():
                answer, pod = await target.post(CHAT, body)
                homes.setdefault(number, set()).add(pod)
                more = "And then it goes on, as rivers do, for a long time. " * 12
                body["messages"] += [answer["choices"][0]["message"], {"role": "user", "content": more}]
            await asyncio.sleep(3)
        assert all(each["tokens"] is None for each in await decisions(target))
        assert [len(pods) for pods in homes.values()] == [1] * 6
        assert len({pod for pods in homes.values() for pod in pods}) == 2


async def test_a_fast_engine_is_waited_for(loop: VirtualTimeLoop, tokenizer: LocalTokenizer) -> None:
    async with gateway(loop, tokenizer, replace(ENGINE, tokenize_seconds=0.001)) as target:
        await target.post(CHAT, chat())
        (made,) = await decisions(target)
        assert made["tokens"] is not None
        assert made["notes"] == []


async def test_nobody_waits_where_waiting_was_in_vain(loop: VirtualTimeLoop, tokenizer: LocalTokenizer) -> None:
    async with gateway(loop, tokenizer, wait_milliseconds=300.0) as target:
        began = loop.time()
        await target.post(CHAT, chat())
        assert loop.time() - began >= 0.3
        for number in range(1, 10):
            await target.post(CHAT, chat(number))
        await asyncio.sleep(2 * SLOW)
        began = loop.time()
        await target.post(CHAT, chat(99))
        assert loop.time() - began < 0.3


async def test_not_more_than_so_many_prompts_are_asked_for_in_the_background(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late, "MAX_LATE", 2)
    async with gateway(loop, tokenizer, replace(ENGINE, tokenize_seconds=1.5)) as target:
        for number in range(4):
            await target.post(CHAT, chat(number))
        assert await target.metric('matrixinfer_kept_entries{part="late_prompts"}') == 2
        notes = [each["notes"][0] for each in reversed(await decisions(target))]
        assert [note.startswith(LATE) for note in notes] == [True, True, False, False]
        assert "engines have not sent the token ids of 2 earlier prompts yet" in notes[3]
        await asyncio.sleep(2)
        assert await target.metric('matrixinfer_kept_entries{part="late_prompts"}') == 0


async def test_equal_prompts_share_a_question_and_none_is_left_at_the_end(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer
) -> None:
    async with gateway(loop, tokenizer) as target:
        await asyncio.gather(*(target.post(CHAT, chat()) for _ in range(5)))
        impatient = asyncio.create_task(target.post(CHAT, chat()))
        await asyncio.sleep(0.001)
        impatient.cancel()  # it takes nothing away from the others
        await asyncio.sleep(SLOW)
        assert (await parity(target))["asking"]["answers"] == 1
        assert [each["late"] is not None for each in await decisions(target)][-5:] == [True] * 5
        await target.post(CHAT, chat(1))
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
