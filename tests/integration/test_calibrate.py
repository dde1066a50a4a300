"""A simulated engine with known times is measured as if it were a real one."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import pytest

from matrixinfer.cli import main
from matrixinfer.pods.session import client_session
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.model import Timing
from matrixinfer.sim.server import SimEngine
from matrixinfer.study.calibration.fit import CalibrationError, fit
from matrixinfer.study.calibration.measure import look, measure
from matrixinfer.study.calibration.plan import plan
from matrixinfer.study.presets import preset
from tests.waiting import eventually

from .gateway_support import nowhere

TIMING = Timing(step=0.03, prefill_token=0.0004, decode_sequence=0.004)
CONFIG = SimEngineConfig(model="m", num_blocks=2_000, max_batched_tokens=512, timing=TIMING)
TOLERANCE = 0.5
"""Machines that run these tests are busy, which adds to what is measured."""


@asynccontextmanager
async def engine(tokenizer: LocalTokenizer, *, api_key: str | None = None) -> AsyncIterator[SimEngine]:
    async with SimEngine(dataclasses.replace(CONFIG, api_key=api_key), tokenizer) as running:
        yield running


async def test_the_times_of_an_engine_are_found(tokenizer: LocalTokenizer) -> None:
    async with engine(tokenizer) as running, client_session() as session:
        seen = await look(session, running.url)
        assert seen.metrics.cache_tokens == CONFIG.num_blocks * CONFIG.block_size
        planned = plan(seen.limits(16), longest=1024, most_together=8, reply=24, repeats=3)
        found = await measure(session, seen, planned, seconds=300)
        stats = running.stats
    assert not found.was_cut
    assert stats.prefix_hits == 0
    assert stats.generated_tokens <= planned.tokens
    times = fit(found.prefills, found.decodes, max_tokens=512).times
    assert times.step == pytest.approx(TIMING.step, rel=TOLERANCE)
    assert times.prefill_token == pytest.approx(TIMING.prefill_token, rel=TOLERANCE)
    assert times.decode_sequence == pytest.approx(TIMING.decode_sequence, rel=TOLERANCE)


async def test_the_time_is_bounded_and_an_early_end_is_reported(tokenizer: LocalTokenizer) -> None:
    async with engine(tokenizer) as running, client_session() as session:
        seen = await look(session, running.url)
        found = await measure(session, seen, plan(seen.limits(16)), seconds=0.5)
        await eventually(lambda: running.stats.running == 0)
    assert found.was_cut
    with pytest.raises(CalibrationError, match="too little"):
        fit(found.prefills, found.decodes, max_tokens=512)


async def test_the_command_writes_a_preset_and_leaves_an_engine_alone_that_serves(
    tokenizer: LocalTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "engine.yaml"
    monkeypatch.setenv("ENGINE_KEY", "secret-key")
    async with engine(tokenizer, api_key="secret-key") as running:
        command = ["calibrate", "--engine", f"{running.url}/v1", "--longest", "512", "--together", "2"]
        command += ["--max-num-batched-tokens", "512", "--output", str(file), "--minutes", "5"]
        assert await asyncio.to_thread(main, command) == 2
        assert "answered 401: name the engine's key" in capsys.readouterr().err
        command += ["--engine-api-key-env", "ENGINE_KEY"]
        assert await asyncio.to_thread(main, command) == 0
        said = capsys.readouterr().err
        assert "(m) will get" in said
        assert "up to 2 at a time" in said
        written = preset(str(file))
        assert (written.kv_tokens, written.block_size, written.max_tokens) == (32_000, 16, 512)
        assert written.timing.step > 0
        headers = {"Authorization": "Bearer secret-key"}
        async with aiohttp.ClientSession(running.url, headers=headers) as session:
            body = {"model": "m", "prompt": [5, 6, 7], "max_tokens": 2_000, "stream": True}
            async with session.post("/v1/completions", data=msgspec.json.encode(body)) as response:
                await response.content.readany()
                assert await asyncio.to_thread(main, command) == 2
    assert "is serving requests" in capsys.readouterr().err


def test_an_engine_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    url = nowhere()
    assert main(["calibrate", "--engine", url]) == 2
    assert f"cannot ask {url}" in capsys.readouterr().err
