"""`matrixinfer doctor` and the Redis of the config."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from matrixinfer.app.agent import Agent
from matrixinfer.config import Config, PodConfig, RedisConfig, checked
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.server import SimEngine
from tests.e2e.fleet import TOKENIZER
from tests.servers import Server, server

from .doctor_support import FAST, Examined, Patient, log_settings

__all__ = ["log_settings"]
pytestmark = pytest.mark.server


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Server]:
    with server(tmp_path / "redis") as made:
        yield made


@pytest.fixture
async def engine() -> AsyncIterator[SimEngine]:
    async with SimEngine(FAST, LocalTokenizer.load(TOKENIZER, "chatml")) as made:
        yield made


@pytest.fixture
def patient(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Patient:
    return Patient(tmp_path, capsys)


async def examine(patient: Patient, engine: SimEngine, redis: dict[str, Any]) -> Examined:
    return await patient.examine(
        {"name": "a", "url": engine.url},
        models=[{"name": "sim", "tokenizer": str(TOKENIZER), "chatTemplate": "chatml"}],
        index={"kind": "redis"},
        redis={"host": "127.0.0.1", "deadlineSeconds": 1.0, **redis},
    )


async def test_all_is_well_with_an_agent_at_work(patient: Patient, engine: SimEngine, valkey: Server) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    redis = RedisConfig(host="127.0.0.1", port=valkey.port)
    settings = checked(Config(pods=(PodConfig(name="a", url=engine.url),), redis=redis))
    async with Agent(settings, listen=None) as agent:
        assert agent.engines.setup.redis is not None
        await agent.engines.setup.redis.flush()
        found = await examine(patient, engine, {"port": valkey.port})
    assert found.code == 0, found.findings
    assert [finding["check"] for finding in found.findings if finding["pod"] is None] == ["redis", "writers"]


async def test_a_server_that_is_not_there(patient: Patient, engine: SimEngine) -> None:
    finding = (await examine(patient, engine, {"port": 1})).only("redis", "blind")
    assert "cannot be asked" in finding["says"]


async def test_pods_without_an_agent(patient: Patient, engine: SimEngine, valkey: Server) -> None:
    finding = (await examine(patient, engine, {"port": valkey.port})).only("writers", "blind")
    assert finding["says"].startswith("no agent is alive for a,")


async def test_a_user_who_may_not_run_scripts_and_blocks_of_another_size(
    patient: Patient, engine: SimEngine, valkey: Server
) -> None:
    with valkey.client() as client:
        client.acl_setuser("reader", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-@scripting"])
        client.hset("matrix:kv:meta:sim", mapping={"block_size": "16", "hash_scheme": "prefix", "version": "1"})
    found = await examine(patient, engine, {"port": valkey.port, "username": "reader", "password": "any"})
    says = {finding["check"]: finding["says"] for finding in found.findings if finding["level"] != "ok"}
    assert "does not let this user run scripts" in says["redis"]
    assert says["scheme"] == "blocks of sim in Redis never match: block_size 16 there and 128 here"
    assert found.code == 2
