"""The dashboard's data, over a gateway in front of simulated engines."""

from __future__ import annotations

from typing import Any

from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from tests.waiting import eventually

from .fleet import Fleet, fleet

COMPLETIONS = "/v1/completions"
ENGINE = SimEngineConfig(model="m", block_size=16, num_blocks=5_000)


async def snapshot(gateway: Fleet) -> Any:
    async with gateway.session.get(f"{gateway.service.gateway.admin_url}/debug/dashboard") as response:
        assert response.status == 200
        return await response.json()


async def test_what_it_counts_is_what_engines_reported(tokenizer: LocalTokenizer) -> None:
    async with fleet(tokenizer, ENGINE, pods=2) as gateway:
        await gateway.settled()
        cached = counted = 0
        for number in range(8):
            prompt = [number % 2] * 400 + list(range(40 * number))
            answer, _ = await gateway.post(COMPLETIONS, {"model": "m", "prompt": prompt, "max_tokens": 1})
            cached += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            counted += answer["usage"]["prompt_tokens"]
            await gateway.settled()

        async def is_counted() -> bool:
            return bool((await snapshot(gateway))["hour"]["requests"] == 8)

        await eventually(is_counted)
        shown = await snapshot(gateway)
        hour = shown["hour"]
        assert (hour["reported_tokens"], hour["reported_of"]) == (cached, counted)
        assert 0 < hour["predicted_tokens"] <= cached
        assert hour["round_robin_of"] == counted
        assert hour["ttft_p50_ms"] > 0
        assert hour["errors"] == 0
        rows = {row["name"]: row for row in shown["endpoints"]}
        assert set(rows) == {"pod-0", "pod-1"}
        assert sum(row["cached_tokens"] for row in rows.values()) == cached
        assert all((row["state"], row["trust"], row["engine_block"]) == ("up", "exact", 16) for row in rows.values())
        assert shown["about"]["api"] == gateway.url
        assert shown["models"] == {"m": 8}
        assert len(shown["decisions"]) == 8
        assert all(row["is_over"] and row["ttft_ms"] > 0 for row in shown["decisions"])


async def test_its_doctor_examines_the_engines_that_are_there(tokenizer: LocalTokenizer) -> None:
    async with fleet(tokenizer, ENGINE, pods=1) as gateway:
        await gateway.settled()
        async with gateway.session.post(f"{gateway.service.gateway.admin_url}/debug/doctor") as response:
            answer = await response.json()
    assert response.status == 200, answer
    assert (answer["summary"]["pods"], answer["summary"]["blind"]) == (1, 0), answer
    assert {finding["pod"] for finding in answer["findings"]} >= {"pod-0"}
