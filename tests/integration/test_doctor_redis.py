"""`matrixinfer doctor` on the shared index in Redis."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from matrixinfer.app.agent import Agent
from matrixinfer.config import BlocksConfig, Config, PodConfig, RedisConfig, checked
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.server import SimEngine
from tests.e2e.fleet import TOKENIZER
from tests.servers import Server, server

from .doctor_support import FAST, DoctorCommand, DoctorReport, log_settings

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
def doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> DoctorCommand:
    return DoctorCommand(tmp_path, capsys)


async def check(doctor: DoctorCommand, engine: SimEngine, redis: dict[str, Any]) -> DoctorReport:
    return await doctor.check(
        {"name": "a", "url": engine.url},
        models=[{"name": "sim", "tokenizer": str(TOKENIZER), "chatTemplate": "chatml"}],
        index={"kind": "redis"},
        redis={"host": "127.0.0.1", "deadlineSeconds": 1.0, **redis},
    )


async def test_a_live_agent_leaves_no_problems(doctor: DoctorCommand, engine: SimEngine, valkey: Server) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    redis = RedisConfig(host="127.0.0.1", port=valkey.port)
    settings = checked(Config(pods=(PodConfig(name="a", url=engine.url),), redis=redis))
    async with Agent(settings, listen=None) as agent:
        assert agent.engines.setup.redis is not None
        await agent.engines.setup.redis.flush()
        found = await check(doctor, engine, {"port": valkey.port})
    assert found.code == 0, found.findings
    assert [finding["check"] for finding in found.findings if finding["pod"] is None] == ["redis", "writers"]


async def test_a_server_that_is_down(doctor: DoctorCommand, engine: SimEngine) -> None:
    finding = (await check(doctor, engine, {"port": 1})).only("redis", "blind")
    assert "does not answer" in finding["message"]


async def test_pods_without_an_agent(doctor: DoctorCommand, engine: SimEngine, valkey: Server) -> None:
    finding = (await check(doctor, engine, {"port": valkey.port})).only("writers", "blind")
    assert finding["message"].endswith("writes for a")


async def test_a_user_without_scripts_and_blocks_of_another_size(
    doctor: DoctorCommand, engine: SimEngine, valkey: Server
) -> None:
    with valkey.client() as client:
        client.acl_setuser("reader", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-@scripting"])
        client.hset("matrix:kv:meta:sim", mapping={"block_size": "16", "hash_scheme": "prefix", "version": "1"})
    found = await check(doctor, engine, {"port": valkey.port, "username": "reader", "password": "any"})
    messages = {finding["check"]: finding["message"] for finding in found.findings if finding["level"] != "ok"}
    assert "does not let this user run scripts" in messages["redis"]
    assert messages["scheme"] == "blocks of sim in Redis never match: block_size is 16 there and 128 here"
    assert found.code == 2


@pytest.mark.parametrize(
    ("blocks", "pod", "level", "words"),
    [
        ({"scheme": "block", "size": 16}, "a", "ok", "are in Redis as the gateway looks for them"),
        ({"scheme": "prefix", "size": 16}, "a", "blind", "keys hash like scheme block, size 16"),
        ({"scheme": "block", "size": 64}, "a", "blind", "keys hash like scheme block, size 16"),
        ({"scheme": "block", "size": 16}, "a.ns", "blind", "the pods in Redis are named `a`, and here `a.ns`"),
    ],
)
async def test_what_others_write_is_compared_with_the_doctors_own_prompt(
    doctor: DoctorCommand,
    engine: SimEngine,
    valkey: Server,
    blocks: dict[str, Any],
    pod: str,
    level: str,
    words: str,
) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    redis = RedisConfig(host="127.0.0.1", port=valkey.port)
    others = BlocksConfig(scheme="block", size=16)
    settings = checked(Config(pods=(PodConfig(name="a", url=engine.url),), redis=redis, blocks=others))
    async with Agent(settings, listen=None):
        with valkey.client() as client:
            client.set("matrix:kv:meta:sim", "")  # other writers do not say how they hash
        found = await doctor.check(
            {"name": pod, "url": engine.url},
            models=[{"name": "sim", "tokenizer": str(TOKENIZER), "chatTemplate": "chatml"}],
            index={"kind": "redis", "writer": "none"},
            redis={"host": "127.0.0.1", "port": valkey.port, "deadlineSeconds": 1.0},
            blocks=blocks,
        )
    (finding,) = found.of("matches")
    assert (finding["level"], words in finding["message"]) == (level, True), finding


async def test_an_index_that_nobody_writes_is_not_well(
    doctor: DoctorCommand, engine: SimEngine, valkey: Server
) -> None:
    for arguments, level, words in (
        ((), "blind", "Redis has no key of the model `sim`"),
        (("--no-probe",), "warning", "not known whether lookups can match"),
    ):
        found = await doctor.check(
            {"name": "a", "url": engine.url},
            arguments=arguments,
            models=[{"name": "sim", "tokenizer": str(TOKENIZER), "chatTemplate": "chatml"}],
            index={"kind": "redis", "writer": "none"},
            redis={"host": "127.0.0.1", "port": valkey.port, "deadlineSeconds": 1.0},
        )
        assert words in found.only("matches", level)["message"]
