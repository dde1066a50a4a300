"""A gateway that tokenizes as its engines do, and one that does not: what it notices, and what it does about it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from matrixinfer.prompt.chat_template import CHATML
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.model import Timing
from matrixinfer.trust import parity, sampling
from tests.virtual_time import VirtualTimeLoop

from .fleet import Fleet, virtual_fleet

pytestmark = pytest.mark.virtual_time

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ENGINE = SimEngineConfig(
    model="m", block_size=16, num_blocks=5_000, timing=Timing(step=0.0005, prefill_token=0, decode_sequence=0)
)
GRACE = 0.1
DISTRUST = "token ids of chat requests have differed from the engine's; only recent blocks count"


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "SAMPLED_EVERY", 1)
    monkeypatch.setattr(sampling, "_GRACE_SECONDS", GRACE)


def template(path: Path, replaced: str, by: str) -> str:
    assert replaced in CHATML
    file = path / "other.jinja"
    file.write_text(CHATML.replace(replaced, by), encoding="utf-8")
    return str(file)


def chat(number: int, **more: Any) -> dict[str, Any]:
    text = f"{number}: " + "The river is long and old, and it flows to the sea. " * 20
    return {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 2, **more}


async def checks(gateway: Fleet, request_class: str = "chat") -> dict[str, Any]:
    """What has been compared, once the last events have come."""
    await asyncio.sleep(2 * GRACE)
    async with gateway.session.get(f"{gateway.service.gateway.admin_url}/debug/tokenizers") as response:
        found: dict[str, Any] = (await response.json())["tokenizers"]["m"]["classes"][request_class]
        return found


async def streamed(gateway: Fleet, body: dict[str, Any]) -> bytes:
    async with gateway.session.post(gateway.url + CHAT, json=body) as response:
        assert response.status == 200
        return await response.read()


async def test_the_same_tokenizer_agrees_in_counts_and_in_events(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer
) -> None:
    async with virtual_fleet(loop, tokenizer, ENGINE, pods=1) as gateway:
        await gateway.post(CHAT, chat(0))  # the pod's first events show its block size
        await asyncio.sleep(GRACE)
        for number in range(1, 5):
            await gateway.post(CHAT, chat(number))
            await checks(gateway)
        await gateway.post(COMPLETIONS, {"model": "m", "prompt": "Once upon a time", "max_tokens": 1})
        await streamed(gateway, chat(9, stream=True, stream_options={"include_usage": True}))
        without_usage = await streamed(gateway, chat(9, stream=True))
        await gateway.post(COMPLETIONS, {"model": "m", "prompt": [1, 2, 3], "max_tokens": 1})
        found = await checks(gateway)
    assert b'"usage":{' not in without_usage
    assert found["approximate"] is False
    assert (found["usage"]["agreed"], found["usage"]["mismatched"]) == (6, 0)
    assert found["events"]["agreed"] >= 4
    assert found["events"]["mismatched"] == 0


async def test_an_empty_prompt_is_the_engines_to_refuse(loop: VirtualTimeLoop, tokenizer: LocalTokenizer) -> None:
    async with virtual_fleet(loop, tokenizer, ENGINE, pods=1) as gateway:
        await gateway.post(CHAT, chat(0))
        await asyncio.sleep(GRACE)
        body = {"model": "m", "prompt": "", "max_tokens": 1}
        async with gateway.session.post(gateway.url + COMPLETIONS, json=body) as response:
            assert response.status == 400


async def test_a_class_of_requests_whose_counts_differ_is_routed_approximately_alone(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer, tmp_path: Path
) -> None:
    other = template(tmp_path, "{%- if tools %}", "You are a river.{%- if tools %}")
    async with virtual_fleet(loop, tokenizer, ENGINE, pods=2, chat_template=other) as gateway:
        for number in range(parity.RUN):
            assert DISTRUST not in (await gateway.explain(CHAT, chat(number)))["notes"]
            await gateway.post(CHAT, chat(number))
        decision = await gateway.explain(CHAT, chat(0))
        assert DISTRUST in decision["notes"]
        assert {pod["matched_blocks"] for pod in decision["pods"].values()} == {None}
        assert (await checks(gateway))["approximate"] is True
        text = {"model": "m", "prompt": "Once upon a time", "max_tokens": 1}
        await gateway.post(COMPLETIONS, text)
        assert (await checks(gateway, "text"))["approximate"] is False
        decision = await gateway.explain(COMPLETIONS, text)
        assert None not in {pod["matched_blocks"] for pod in decision["pods"].values()}


async def test_ids_that_differ_in_equal_number_show_in_the_events(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer, tmp_path: Path
) -> None:
    other = template(tmp_path, "message.role ~ '\\n'", "('robot' if message.role == 'user' else message.role) ~ '\\n'")
    assert len(tokenizer.encode("robot", add_special_tokens=False)) == 1
    async with virtual_fleet(loop, tokenizer, ENGINE, pods=1, chat_template=other) as gateway:
        await gateway.post(CHAT, chat(0))
        await asyncio.sleep(GRACE)
        for number in range(1, parity.RUN + 1):
            await gateway.post(CHAT, chat(number))
            found = await checks(gateway)
    assert (found["usage"]["mismatched"], found["events"]["agreed"]) == (0, 0)
    assert found["events"]["mismatched"] >= parity.RUN
    assert found["approximate"] is True


TOOLS = [
    {
        "type": "function",
        "function": {"name": f"tool_{i}", "description": "Does it.", "parameters": {"type": "object"}},
    }
    for i in range(10)
]


async def test_tools_that_the_engine_writes_differently_do_not_disturb_plain_chats(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer, tmp_path: Path
) -> None:
    """Their number of tokens is the same, so only the events show it."""
    other = template(tmp_path, "tool | tojson ~", "(tool | tojson).replace('tool_', 'took_') ~")
    async with virtual_fleet(loop, tokenizer, ENGINE, pods=1, chat_template=other) as gateway:
        await gateway.post(CHAT, chat(0))
        await asyncio.sleep(GRACE)
        for number in range(1, 2 * parity.RUN + 1):
            tools = [*TOOLS, {"type": "function", "function": {"name": f"tool_{number * 1000}"}}]
            await gateway.post(CHAT, chat(number, tools=tools[::-1]))
            await checks(gateway, "chat+tools")
            await gateway.post(CHAT, chat(number))
            await checks(gateway)
        plain, with_tools = await checks(gateway), await checks(gateway, "chat+tools")
        decision = await gateway.explain(CHAT, chat(1))
        again = await gateway.explain(CHAT, chat(1, tools=TOOLS))
        metric = 'matrixinfer_tokenizer_approximate{class="%s",model="m"}'
        shown = [await gateway.metric(metric % each) for each in ("chat", "chat+tools")]
    assert (plain["approximate"], with_tools["approximate"]) == (False, True)
    assert (plain["events"]["mismatched"], with_tools["events"]["agreed"]) == (0, 0)
    assert decision["pods"]["pod-0"]["matched_blocks"]
    assert again["pods"]["pod-0"]["matched_blocks"] is None
    assert any(note.startswith("token ids of chat+tools requests") for note in again["notes"])
    assert shown == [0, 1]


SGLANG = replace(ENGINE, flavor="sglang", cache_report=True)


async def test_chats_are_rendered_as_the_sglang_that_serves_them_does(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer
) -> None:
    history = [*chat(1)["messages"], {"role": "assistant", "content": "It does."}]
    parts = [{"type": "text", "text": "The river"}, {"type": "text", "text": "flows. " * 100}]
    bodies = [
        chat(2, tools=TOOLS),
        chat(3, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "tool_3"}}),
        chat(4, reasoning_effort=0.5),
        chat(5, messages=[{"role": "user", "content": parts}]),
        chat(6, messages=history),
        chat(7, messages=history, continue_final_message=True),
        chat(8, input_ids=list(range(100, 400))),
    ]
    async with virtual_fleet(loop, tokenizer, SGLANG, pods=2) as gateway:
        for body in bodies:
            for turn in range(2):
                answer = await gateway.ask(CHAT, body)
                assert answer.cached - 128 < answer.predicted <= answer.cached  # in whole token blocks
                assert bool(answer.cached) or not turn
                await asyncio.sleep(2 * GRACE)
        async with gateway.session.get(f"{gateway.service.gateway.admin_url}/debug/tokenizers") as response:
            classes = (await response.json())["tokenizers"]["m"]["classes"]
    assert set(classes) == {"chat", "chat+tools", "chat+reasoning", "chat+parts", "chat+other"}
    for found in classes.values():
        assert found["usage"]["agreed"]
        assert found["usage"]["mismatched"] == found["events"]["mismatched"] == 0
