"""Engines that are not what they were: ranks, ports, sleep and another model, through the whole gateway."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest

from matrixinfer.kvevents import subscription
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.server import SimEngine
from tests.integration.doctor_support import altered
from tests.ports import consecutive_ports, free_port
from tests.waiting import eventually

from .fleet import Fleet, Json, fleet, gateway
from .test_failures import COMPLETIONS, ENGINE, SCHEDULER, body, serve, wrong

PROMPT = [7] * 100
ASLEEP = b"""
vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="awake"} 0.0
vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="weights_offloaded"} 1.0
"""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscription, "HEARTBEAT_SECONDS", 0.05)


@dataclass
class Behind:
    """An engine behind something that changes its answers."""

    engine: SimEngine
    url: str

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


async def pods(target: Fleet) -> dict[str, Json]:
    async with target.session.get(f"{target.service.gateway.admin_url}/debug/pods") as response:
        return {pod["name"]: pod for pod in (await response.json())["pods"]}


async def test_sglang_is_found_with_its_ranks_and_its_load_without_configuration(tokenizer: LocalTokenizer) -> None:
    port = consecutive_ports(6)
    engine = replace(
        ENGINE,
        flavor="sglang",
        cache_report=True,
        data_parallel_size=2,
        kv_port=port,
        replay_port=port + 2,
        load_feed=True,
        load_port=port + 4,
    )
    async with fleet(tokenizer, engine, pods=1, scheduler=SCHEDULER) as target:
        answers = await serve(target, 40)
        assert not wrong(answers)
        assert {answer.endpoint for answer in answers} == {"pod-0@dp0", "pod-0@dp1"}
        assert sum(answer.cached for answer in answers) > 0
        (pod,) = (await pods(target)).values()
        assert (pod["engine"], pod["version"], pod["ranks"]) == ("sglang", "0.5.23", 2)
        assert {name: feed["trust"] for name, feed in pod["feeds"].items()} == dict.fromkeys(
            ("pod-0@dp0", "pod-0@dp1"), "exact"
        )
        assert set(pod["published_load"]) == {"pod-0@dp0", "pod-0@dp1"}
        assert await target.metric('matrixinfer_load_reports_total{outcome="taken",pod="pod-0@dp1"}') > 0
        assert await target.metric('matrixinfer_load_reports_total{outcome="malformed",pod="pod-0@dp1"}') == 0


async def test_ports_that_engines_exchange_at_a_restart_are_not_taken_for_the_other_s(
    tokenizer: LocalTokenizer,
) -> None:
    events, replays = consecutive_ports(2), consecutive_ports(2)
    configs = [replace(ENGINE, port=free_port(), kv_port=events + n, replay_port=replays + n) for n in (0, 1)]
    async with AsyncExitStack() as stack:
        async with AsyncExitStack() as old:
            engines = [await old.enter_async_context(SimEngine(config, tokenizer)) for config in configs]
            target = await stack.enter_async_context(gateway(engines, scheduler=SCHEDULER))
            await target.settled()
        swapped = [
            replace(config, kv_port=other.kv_port, replay_port=other.replay_port)
            for config, other in zip(configs, reversed(configs), strict=True)
        ]
        engines = [await stack.enter_async_context(SimEngine(config, tokenizer)) for config in swapped]
        await target.post(COMPLETIONS, body(PROMPT), to=engines[0].url)  # only the first has it
        seen = []

        async def is_right() -> bool:
            decision = await target.explain(COMPLETIONS, body(PROMPT))
            view = {name: (each["trust"], each["matched_blocks"]) for name, each in decision["pods"].items()}
            seen.append(view)
            return view == {"pod-0": ("exact", 6), "pod-1": ("exact", 0)}

        await eventually(is_right)
        assert not [view for view in seen if view.get("pod-1") == ("exact", 6)]


async def test_an_engine_that_has_restarted_is_known_exactly_before_its_first_request(
    tokenizer: LocalTokenizer,
) -> None:
    config = replace(ENGINE, port=free_port(), kv_port=free_port(), replay_port=free_port())
    async with AsyncExitStack() as stack:
        async with SimEngine(config, tokenizer) as old:
            target = await stack.enter_async_context(gateway([old], scheduler=SCHEDULER))
            await target.post(COMPLETIONS, body(PROMPT))
            await target.settled()
        await stack.enter_async_context(SimEngine(config, tokenizer))

        async def is_exact() -> bool:
            (pod,) = (await pods(target)).values()
            (feed,) = pod["feeds"].values()
            return bool(feed["trust"] == "exact" and not feed["engine_blocks"] and pod["healthy"])

        await eventually(is_exact)
        assert (await target.explain(COMPLETIONS, body(PROMPT)))["pods"]["pod-0"]["matched_blocks"] == 0


async def test_a_sleeping_engine_gets_no_requests_and_is_known_to_hold_nothing(tokenizer: LocalTokenizer) -> None:
    asleep = False

    def metrics(status: int, text: bytes) -> tuple[int, bytes]:
        return status, text + ASLEEP if asleep else text

    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(SimEngine(ENGINE, tokenizer)) for _ in (0, 1)]
        urls = [await stack.enter_async_context(altered(engines[0], {"/metrics": metrics})), engines[1].url]
        behind = [cast("SimEngine", Behind(engine, url)) for engine, url in zip(engines, urls, strict=True)]
        target = await stack.enter_async_context(gateway(behind, scheduler=SCHEDULER))
        await target.post(COMPLETIONS, body(PROMPT), to=engines[0].url)
        await target.settled()
        assert (await target.explain(COMPLETIONS, body(PROMPT)))["chosen"] == "pod-0"
        asleep = True

        async def is_empty() -> bool:
            feed = (await pods(target))["pod-0"]["feeds"]["pod-0"]
            return bool(feed["engine_blocks"] == 0)

        await eventually(is_empty)
        assert (await pods(target))["pod-0"]["asleep"] == "weights_offloaded"
        assert await target.metric('matrixinfer_pod_asleep{pod="pod-0"}') == 1
        decision = await target.explain(COMPLETIONS, body(PROMPT))
        assert list(decision["pods"]) == ["pod-1"]
        asleep = False

        async def is_back() -> bool:
            return set((await target.explain(COMPLETIONS, body(PROMPT)))["pods"]) == {"pod-0", "pod-1"}

        await eventually(is_back)
        assert engines[0].ranks[0].reset()
        await target.post(COMPLETIONS, body(PROMPT), to=engines[0].url)

        async def is_exact() -> bool:
            chosen = (await target.explain(COMPLETIONS, body(PROMPT)))["pods"]["pod-0"]
            return (chosen["trust"], chosen["matched_blocks"]) == ("exact", 6)

        await eventually(is_exact)


async def test_another_model_behind_the_same_address_is_noticed_at_the_next_reading(tokenizer: LocalTokenizer) -> None:
    port = free_port()
    async with AsyncExitStack() as stack:
        async with SimEngine(replace(ENGINE, port=port), tokenizer) as engine:
            target = await stack.enter_async_context(gateway([engine], scheduler=SCHEDULER))
            await target.settled()
        other = await stack.enter_async_context(SimEngine(replace(ENGINE, model="other", port=port), tokenizer))
        await target.post(COMPLETIONS, body(PROMPT) | {"model": "other"}, to=other.url)

        async def is_the_other() -> bool:
            pod = (await pods(target))["pod-0"]
            return bool(pod["model"] == "other" and pod["feeds"]["pod-0"]["engine_blocks"] == 6)

        async with asyncio.timeout(10):
            await eventually(is_the_other)
