"""Requests through a gateway, its access log, and the log's replay."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import numpy as np
import pytest

from matrixinfer.config import AccessLogConfig, BlocksConfig
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.model import Timing
from matrixinfer.sim.server import SimEngine
from matrixinfer.study.engine import EngineShape
from matrixinfer.study.fleet import Fleet as ReplayFleet
from matrixinfer.study.policies import POLICIES
from matrixinfer.study.reading import read
from matrixinfer.study.runs import replay
from matrixinfer.telemetry.access_entry import AccessEntry

from .fleet import Fleet, gateway

ENGINE = SimEngineConfig(
    model="m",
    block_size=16,
    num_blocks=4_000,
    timing=Timing(step=0.001, prefill_token=0.00001, decode_sequence=0.0001),
)
PATH = "/v1/completions"


@asynccontextmanager
async def logged(tokenizer: LocalTokenizer, config: AccessLogConfig, *, pods: int = 2) -> AsyncIterator[Fleet]:
    async with (
        SimEngine(ENGINE, tokenizer) as one,
        SimEngine(ENGINE, tokenizer) as other,
        gateway([one, other][:pods], blocks=BlocksConfig(size=16), access_log=config) as fleet,
    ):
        await fleet.settled()
        yield fleet


def lines(path: Path) -> list[AccessEntry]:
    return [msgspec.json.decode(line, type=AccessEntry) for line in path.read_bytes().splitlines()]


async def converse(fleet: Fleet, number: int, *, turns: int, shared: Sequence[int]) -> None:
    """A conversation whose prompts contain the answers before them, as a client that streams."""
    draw = np.random.default_rng(number)
    prompt = [*shared, *draw.integers(0, 100_000, 100).tolist()]
    for turn in range(turns):
        body = {
            "model": "m",
            "prompt": prompt,
            "max_tokens": 8,
            "stream": True,
            "stream_options": {"include_usage": turn % 2 == 0},
        }
        headers = {"x-session-id": f"user-{number}@example.org"}
        async with fleet.session.post(fleet.url + PATH, json=body, headers=headers) as response:
            assert response.status == 200
            await response.read()
        prompt += draw.integers(0, 100_000, 60).tolist()


async def test_a_log_of_a_gateway_replays_as_it_was(tokenizer: LocalTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    shared = np.random.default_rng(99).integers(0, 100_000, 320).tolist()
    async with logged(tokenizer, AccessLogConfig(path=str(path))) as fleet:
        await converse(fleet, 0, turns=1, shared=shared)
        await fleet.settled()
        await asyncio.gather(*(converse(fleet, number, turns=4, shared=shared) for number in range(6)))
        hit_rate = fleet.hit_rate()
        prompts = sum(engine.stats.prefix_queries for engine in fleet.engines)
    entries = lines(path)
    assert len(entries) == 25
    assert all(each.outcome == "answered" and each.status == 200 and each.pod and each.session for each in entries)
    assert all({"body", "parse", "match", "first_byte", "total"} <= each.ms.keys() for each in entries)
    assert {each.output_tokens for each in entries} == {8, None}
    assert {each.stream_events for each in entries if each.output_tokens is None} == {9}
    reported = [each for each in entries if each.cached_tokens is not None]
    assert len(reported) == 13
    assert any(each.cached_tokens == each.predicted_hit_tokens != 0 for each in reported)
    text = path.read_text()
    assert "example.org" not in text
    assert str(shared[0]) + "," not in text

    trace = read(path, tokenizer=None)
    recorded = trace.settings["recorded"]
    assert isinstance(recorded, dict)
    assert 0 < recorded["hit_rate"] < 1
    assert recorded["ttft_mean_s"] > 0
    assert sum(turn.prompt for turn in trace.turns) == prompts
    assert {turn.reply for turn in trace.turns} == {8}
    shape = EngineShape(block_size=16, timing=ENGINE.timing)
    outcome = replay(trace, ReplayFleet(shape=shape, pods=2, pod_tokens=64_000), POLICIES["kv_aware"])
    assert outcome.results["requests"] == 25
    assert outcome.results["hit_rate"] == pytest.approx(hit_rate, abs=0.1)


async def test_what_fails_is_logged_with_its_reason(tokenizer: LocalTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    async with logged(tokenizer, AccessLogConfig(path=str(path), sample=0.0), pods=1) as fleet:
        await fleet.post(PATH, {"model": "m", "prompt": [1, 2, 3], "max_tokens": 1})
        for body in (b"{", b'{"model": "other", "prompt": "x"}', b'{"model": "m", "prompt": [1], "max_tokens": 0}'):
            async with fleet.session.post(fleet.url + PATH, data=body):
                pass
        slow = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 3_000, "stream": True}
        async with fleet.session.post(fleet.url + PATH, json=slow) as response:
            await response.content.readany()
        cut = fleet.session.post(fleet.url + PATH, json=slow)
        async with cut as response:
            await response.content.readany()
            await fleet.engines[0].__aexit__(None, None, None)
            with pytest.raises(aiohttp.ClientError):
                await response.read()
        async with fleet.session.post(fleet.url + PATH, json=slow) as response:
            assert response.status == 502
    found = [(each.outcome, each.status, each.error, each.pod, each.sampled) for each in lines(path)]
    assert found == [
        ("refused", 400, "invalid_request", None, False),
        ("refused", 404, "model_not_found", None, False),
        ("refused", 400, None, "pod-0", False),
        ("client_left", 499, None, "pod-0", False),
        ("broken_off", 502, "pod_unreachable", "pod-0", False),
        ("refused", 502, "pod_unreachable", "pod-0", False),
    ]


async def test_without_blocks_no_hash_is_written(tokenizer: LocalTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    async with logged(tokenizer, AccessLogConfig(path=str(path), blocks=False), pods=1) as fleet:
        await fleet.post(PATH, {"model": "m", "prompt": list(range(200)), "max_tokens": 1})
        assert await fleet.metric('matrixinfer_access_log_lines_total{outcome="dropped"}') == 0
    (only,) = lines(path)
    assert (only.blocks, only.after, only.block_size) == ((), None, None)
