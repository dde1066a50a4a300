"""A gateway that tokenizes as its engines do, and one that does not: what it notices, and what it does about it."""

from __future__ import annotations

import asyncio
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
