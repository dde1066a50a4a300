"""The users that docs/redis.md lists can do what it says, and no command is refused."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from matrixinfer.access.callers import Caller
from matrixinfer.access.limits import Limits
from matrixinfer.access.quota import Amounts
from matrixinfer.access.shared import SharedLedger
from matrixinfer.app.agent import Agent
from matrixinfer.app.service import Service
from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.cli import main
from matrixinfer.config import Config, load
from matrixinfer.config.access import QuotaConfig
from matrixinfer.index.redis.reclaim import LOCK, Reclaimer
from matrixinfer.index.redis.store import Store
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.server import SimEngine
from tests.e2e.fleet import TOKENIZER
from tests.ports import free_port
from tests.servers import Server, server
from tests.waiting import DEADLINE_SECONDS, eventually

from .doctor_support import FAST, DoctorCommand, DoctorReport, log_settings

__all__ = ["log_settings"]
pytestmark = pytest.mark.server

DOCS = Path(__file__).parents[2] / "docs" / "redis.md"
USERS = {
    line.split()[2]: line.replace(">…", ">pw").split()[2:]
    for line in re.findall(r"^ACL SETUSER .*$", DOCS.read_text(), flags=re.MULTILINE)
}
PROMPT = list(range(1000, 1700))


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Server]:
    with server(tmp_path / "redis") as made:
        with made.client() as client:
            for words in USERS.values():
                client.execute_command("ACL", "SETUSER", *words)
        yield made


@pytest.fixture
async def engine() -> AsyncIterator[SimEngine]:
    async with SimEngine(FAST, LocalTokenizer.load(TOKENIZER, "chatml")) as made:
        yield made


def settings(engine: SimEngine, valkey: Server, user: str, **index: str) -> dict[str, Any]:
    return {
        "listen": "127.0.0.1:0",
        "admin": f"127.0.0.1:{free_port()}",
        "models": [{"name": "sim", "tokenizer": str(TOKENIZER), "chatTemplate": "chatml"}],
        "pods": [{"name": "a", "url": engine.url}],
        "index": {"kind": "redis", **index},
        "redis": {
            "host": "127.0.0.1",
            "port": valkey.port,
            "username": user,
            "password": "pw",
            "deadlineSeconds": 1.0,
            "shareLoad": user == "matrixinfer",
        },
    }


async def test_limits_can_be_counted_together(valkey: Server) -> None:
    config = valkey.config(username="matrixinfer", password="pw")
    caller = Caller(name="a", tenant="a", account="a", quota=QuotaConfig(requests=5, concurrent_requests=5))
    async with Store(config) as store, Limits(SharedLedger(store), deadline_seconds=DEADLINE_SECONDS) as limits:
        taken = await limits.reserve(caller, Amounts(1, 10))
        assert taken is not None
        assert taken.is_shared
        await SharedLedger(store).renew("a", [taken.request])
        limits.settle(taken, Amounts(1, 5))
        await eventually(lambda: not limits.unsettled)
    assert refused(valkey) == []


def refused(valkey: Server) -> list[tuple[str, str]]:
    with valkey.client() as client:
        return [(entry["reason"], entry["object"]) for entry in client.acl_log()]


def other(config: Config) -> Config:
    """A second gateway beside the first."""
    return msgspec.structs.replace(config, admin="127.0.0.1:0")


async def report_of(doctor: DoctorCommand, file: str) -> DoctorReport:
    code, out, err = await doctor.run("--config", file, "--json")
    assert err == ""
    return DoctorReport(code, json.loads(out[out.index("{\n") :]))  # log lines of this process may come first


async def matched(service: Service) -> int:
    url = f"{service.gateway.admin_url}/debug/route?path=/v1/completions"
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, json={"model": "sim", "prompt": PROMPT}) as response,
    ):
        answer = await response.json()
    return answer["pods"]["a"]["matched_blocks"] or 0


async def test_the_listed_user_can_do_everything(
    valkey: Server, engine: SimEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = settings(engine, valkey, "matrixinfer")
    doctor = DoctorCommand(tmp_path, capsys)
    file = doctor.config(*plain.pop("pods"), **plain)
    config = load(Path(file))
    async with Agent(config, listen=None), Service(config) as service, Service(other(config)):
        body = {"model": "sim", "prompt": PROMPT, "max_tokens": 1}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{service.gateway.url}/v1/completions", json=body) as response,
        ):
            assert response.status == 200

        async def holds() -> bool:
            return await matched(service) == 5

        await eventually(holds)
        for words in (
            ["stats"],
            ["show", "--pod", "a"],
            ["purge", "--pod", "a", "--yes"],
            ["purge", "--model", "x", "--yes"],
        ):
            assert await asyncio.to_thread(main, ["index", *words, "--config", file]) == 0
        capsys.readouterr()
        code, out, _ = await doctor.run("--config", file)
        assert code == 0, out
        with valkey.client() as client:
            client.delete(LOCK)  # the agent's reclaimer has it
        assert config.redis is not None
        async with Store(config.redis) as store:
            reclaimer = Reclaimer(store, max_age=1.0, keys_per_second=1e9, clock=lambda: time.time() + 3_600)
            assert await reclaimer.take_lock()
            await reclaimer.once()
        assert refused(valkey) == []


async def test_the_user_that_only_looks_up_finds_blocks_and_is_not_called_blind(
    valkey: Server, engine: SimEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = settings(engine, valkey, "matrixinfer-lookup", writer="none")
    with valkey.client() as client:
        for block in TokenBlockProcessor(128).chain(PROMPT)[:4]:
            client.hset(f"matrix:kv:block:sim@{block}", "a", str(int(time.time()) + 2))
    doctor = DoctorCommand(tmp_path, capsys)
    file = doctor.config(*plain.pop("pods"), **plain)
    async with Service(load(Path(file))) as service:

        async def holds() -> bool:
            return await matched(service) == 4

        await eventually(holds)
    report = await report_of(doctor, file)
    assert {finding["level"] for finding in report.of("redis")} == {"ok", "warning"}
    assert "lookups take five times as long" in report.of("redis")[1]["message"]
    assert "redis.scripts to false" in report.of("redis")[1]["fix"]
    assert report.summary["blind"] == 0
    assert {command for _, command in refused(valkey)} <= {"script|load", "evalsha", "time", "scan", "client|setinfo"}


async def test_the_doctor_tells_why_redis_cannot_be_used(
    valkey: Server, engine: SimEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor = DoctorCommand(tmp_path, capsys)
    with valkey.client() as client:
        client.acl_setuser("elsewhere", enabled=True, passwords=["+pw"], keys=["other:*"], commands=["+@all"])
        client.acl_setuser("nothing", enabled=True, passwords=["+pw"], keys=["*"], commands=["+ping"])
        client.acl_setuser("default", enabled=True, reset=True, passwords=["+root"], keys=["*"], categories=["+@all"])
    for login, words, fix in (
        (
            {"username": "matrixinfer", "password": "wrong"},
            "refuses the login of the user `matrixinfer`",
            "redis.password",
        ),
        ({}, "refuses the login of the default user", "REDIS_PASSWORD"),
        (
            {"username": "elsewhere", "password": "pw"},
            "does not let the user `elsewhere` read the index",
            "Permissions",
        ),
        ({"username": "nothing", "password": "pw"}, "does not let the user `nothing` read the index", "Permissions"),
        ({"port": 1}, "does not answer", "start it"),
    ):
        plain = settings(engine, valkey, "x")
        redis = {"host": "127.0.0.1", "port": valkey.port, **login}
        file = doctor.config(*plain.pop("pods"), **{**plain, "redis": redis})
        report = await report_of(doctor, file)
        (finding,) = report.of("redis")
        assert finding["level"] == "blind"
        assert words in finding["message"]
        assert fix in finding["fix"]
        assert await asyncio.to_thread(main, ["index", "stats", "--config", file]) == 2
        said = capsys.readouterr().err.lower()
        assert (words.lower() in said, fix.lower() in said) == (True, True)
