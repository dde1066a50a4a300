"""Several processes behind one address: what they share, and what the death of one costs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from matrixinfer.access.key_file import hash_of
from tests.waiting import DEADLINE_SECONDS, eventually

from .test_serve import command, engine

Json = dict[str, Any]


@dataclass
class Fleet:
    process: asyncio.subprocess.Process
    listen: str
    admin: str
    session: aiohttp.ClientSession
    lines: list[Json] = field(default_factory=list)

    async def get(self, path: str, *, at: str | None = None) -> tuple[int, str]:
        async with self.session.get((at or self.admin) + path) as response:
            return response.status, await response.text()

    async def call(self, method: str, path: str, body: object = None) -> tuple[int, Json]:
        async with self.session.request(method, self.admin + path, json=body) as response:
            return response.status, await response.json()

    async def metric(self, series: str) -> float | None:
        _, text = await self.get("/metrics")
        return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{series} ")), None)

    async def ask(self, number: int = 0, **more: object) -> int:
        """The status of an answer, over a connection of its own; 0 if it broke off."""
        body = {"model": "sim", "prompt": [number] * 64, "max_tokens": 2, **more}
        headers = {"Connection": "close"}
        try:
            async with self.session.post(f"{self.listen}/v1/completions", json=body, headers=headers) as response:
                await response.read()
                return response.status
        except aiohttp.ClientError:
            return 0

    def children(self) -> list[int]:
        """The processes of the workers."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(each) for each in path.read_text().split()]

    def events(self, name: str) -> list[Json]:
        return [each for each in self.lines if each["event"] == name]


@asynccontextmanager
async def workers(count: int, config: Json, folder: Path) -> AsyncIterator[Fleet]:
    file = folder / "gateway.yaml"
    base = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "podWatch": {"scrapeIntervalSeconds": 0.2}}
    file.write_text(json.dumps({**base, **config}))
    async with command("serve", "--config", str(file), "--workers", str(count)) as process:
        stream = process.stderr
        assert stream is not None
        lines: list[Json] = []
        async with asyncio.timeout(2 * DEADLINE_SECONDS):
            while True:
                lines.append(json.loads(await stream.readline()))
                if lines[-1]["event"] == "gateway_started":
                    break

        async def read() -> None:
            async for line in stream:
                lines.append(json.loads(line))  # noqa: PERF401 - they are needed as they come

        reading = asyncio.create_task(read())
        timeout = aiohttp.ClientTimeout(total=2 * DEADLINE_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            fleet = Fleet(process, lines[-1]["listen"], lines[-1]["admin"], session, lines)
            try:
                yield fleet
            finally:
                if process.returncode is None:
                    process.send_signal(signal.SIGINT)
                    async with asyncio.timeout(2 * DEADLINE_SECONDS):
                        await process.wait()
                reading.cancel()


def pods(*urls: str) -> Json:
    return {"pods": [{"name": f"pod-{i}", "url": url} for i, url in enumerate(urls)]}


async def test_workers_share_the_port_and_one_admin_listener_shows_all_of_them(tmp_path: Path) -> None:
    async with engine() as (_, one), workers(2, pods(one["url"]), tmp_path) as fleet:
        assert len(fleet.children()) == 2
        assert await asyncio.gather(*map(fleet.ask, range(60))) == [200] * 60
        assert await fleet.metric('matrixinfer_requests_total{code="200",model="sim"}') == 60
        assert await fleet.metric("matrixinfer_workers") == 2
        _, public = await fleet.get("/metrics", at=fleet.listen)
        assert 'matrixinfer_requests_total{code="200",model="sim"} 60.0' in public
        status, decisions = await fleet.call("GET", "/debug/decisions?limit=1000")
        assert (status, len(decisions["decisions"])) == (200, 60)
        stamps = [each["at"] for each in decisions["decisions"]]
        assert stamps == sorted(stamps, reverse=True)
        assert (await fleet.get("/ready"))[0] == 200
        for page in ("/debug/pods", "/debug/tokenizers", "/debug/index", "/debug/ladder"):
            for query, number in (("", 1), ("?worker=1", 1), ("?worker=2", 2)):
                status, shown = await fleet.call("GET", page + query)
                assert (status, shown["worker"], shown["workers"]) == (200, number, 2)
        status, answer = await fleet.call("GET", "/debug/pods?worker=3")
        assert (status, answer["error"]["param"]) == (400, "worker")
        status, ladder = await fleet.call("GET", "/debug/ladder?since=60")
        assert (status, ladder["workers"], ladder["since_seconds"]) == (200, 2, 60)
        assert 0 < ladder["ladder"]["requests"] <= 60
        assert (await fleet.call("GET", "/debug/ladder?since=x"))[0] == 400
        async with fleet.session.get(f"{fleet.admin}/debug/dashboard/events") as events:
            view = json.loads((await events.content.readuntil(b"\n\n")).decode().partition("data: ")[2])
        assert (view["about"]["worker"], view["about"]["workers"], view["names"]) == (1, 2, ["pod-0"])
        async with command("explain", "--ladder", "--admin", fleet.admin) as explain:
            printed, _ = await explain.communicate()
        assert printed.startswith(b"of the requests of worker 1 of 2:\n")

        async def hear_each_other() -> bool:
            return await fleet.metric("matrixinfer_peers") == 1

        await eventually(hear_each_other, pause=0.1)


async def test_the_death_of_a_worker_costs_only_its_own_requests(tmp_path: Path) -> None:
    async with engine("--step-seconds", "0.02") as (_, one), workers(2, pods(one["url"]), tmp_path) as fleet:
        victim, survivor = fleet.children()
        streams = [asyncio.create_task(fleet.ask(i, stream=True, max_tokens=150)) for i in range(24)]

        async def all_run() -> bool:
            return await fleet.metric('matrixinfer_in_flight{pod="pod-0"}') == 24

        await eventually(all_run, pause=0.1)
        os.kill(victim, signal.SIGKILL)
        meanwhile = [await fleet.ask(100 + i) for i in range(20)]
        assert meanwhile == [200] * 20
        statuses = await asyncio.gather(*streams)
        broken = statuses.count(0)
        assert set(statuses) <= {0, 200}
        assert 0 < broken < 24  # its own, and no others

        async def replaced() -> bool:
            return len(fleet.children()) == 2 and await fleet.metric("matrixinfer_workers") == 2

        await eventually(replaced, pause=0.1)
        assert survivor in fleet.children()
        assert victim not in fleet.children()
        assert [each["exit_code"] for each in fleet.events("worker_died")] == [-9]
        before = await fleet.metric('matrixinfer_requests_total{code="200",model="sim"}')
        assert await fleet.ask() == 200
        assert await fleet.metric('matrixinfer_requests_total{code="200",model="sim"}') == (before or 0) + 1


async def test_what_operators_change_holds_at_every_worker_and_at_a_new_one(tmp_path: Path) -> None:
    async with engine() as (_, one), engine() as (_, two), workers(2, pods(one["url"]), tmp_path) as fleet:
        assert (await fleet.call("POST", "/admin/pods", {"name": "more", "url": two["url"]}))[0] == 201
        assert (await fleet.call("POST", "/admin/pods/pod-0/drain"))[0] == 202

        async def states() -> dict[str, str]:
            _, answer = await fleet.call("GET", "/admin/pods")
            return {each["name"]: each["state"] for each in answer["pods"]}

        async def holds() -> bool:
            return await states() == {"more": "present", "pod-0": "drained"}

        await eventually(holds, pause=0.1)
        for victim in fleet.children():  # one after the other, until both are new
            os.kill(victim, signal.SIGKILL)

            async def all_serve(victim: int = victim) -> bool:
                is_replaced = victim not in fleet.children() and len(fleet.children()) == 2
                return is_replaced and await fleet.metric("matrixinfer_workers") == 2

            await eventually(all_serve, pause=0.1)
        await eventually(holds, pause=0.1)
        status, answer = await fleet.call("POST", "/admin/pods", {"name": "bad"})
        assert status == 400, answer


async def test_a_reload_takes_effect_at_every_worker_or_at_none(tmp_path: Path) -> None:
    config = {**pods("http://127.0.0.1:1"), "reload": {"watch": False}}
    async with workers(2, config, tmp_path) as fleet:
        file = tmp_path / "gateway.yaml"
        base = json.loads(file.read_text())

        async def statuses() -> set[int]:
            return set(await asyncio.gather(*(fleet.ask(i, prompt="x" * 500) for i in range(30))))

        assert 413 not in await statuses()
        file.write_text(json.dumps({**base, "limits": {"maxBodyBytes": 300}}))
        status, outcome = await fleet.call("POST", "/admin/reload")
        assert (status, outcome["result"], outcome["changed"]) == (200, "applied", ["limits.maxBodyBytes"])
        assert await statuses() == {413}
        assert await fleet.metric("matrixinfer_config_generation") == 2
        file.write_text(json.dumps({**base, "blocks": {"size": 16}}))
        status, outcome = await fleet.call("POST", "/admin/reload")
        assert (status, outcome["restart"]) == (409, ["blocks.size"])
        assert await statuses() == {413}


@pytest.mark.parametrize("isolates", [False, True])
async def test_a_stored_response_is_its_tenant_s_at_every_worker(tmp_path: Path, isolates: bool) -> None:
    keys = [{"name": name, "hash": hash_of(f"sk-{name}")} for name in ("ann", "bob")]
    (tmp_path / "keys.yaml").write_text(json.dumps({"keys": keys}))
    (tmp_path / "secret").write_text("s" * 40)
    access: Json = {"keysFile": "keys.yaml", **({"isolation": {"secretFile": "secret"}} if isolates else {})}
    async with (
        engine() as (_, one),
        engine() as (_, two),
        workers(2, {**pods(one["url"], two["url"]), "access": access}, tmp_path) as fleet,
    ):

        async def ask(name: str, path: str, body: object = None) -> tuple[int, Json]:
            headers = {"Authorization": f"Bearer sk-{name}", "Connection": "close"}  # each at any worker
            method = "GET" if body is None else "POST"
            async with fleet.session.request(method, fleet.listen + path, json=body, headers=headers) as response:
                return response.status, await response.json()

        status, made = await ask("ann", "/v1/responses", {"model": "sim", "input": "hello", "max_output_tokens": 2})
        assert status == 200, made
        page = f"/v1/responses/{made['id']}"
        more = {"model": "sim", "input": "and?", "max_output_tokens": 2, "previous_response_id": made["id"]}
        assert [(await ask("bob", page))[0] for _ in range(12)] == [404] * 12
        assert [(await ask("bob", "/v1/responses", more))[0] for _ in range(12)] == [404] * 12
        assert [(await ask("ann", page))[0] for _ in range(12)] == [200] * 12
        assert [(await ask("ann", "/v1/responses", more))[0] for _ in range(12)] == [200] * 12


async def test_sigterm_drains_every_worker(tmp_path: Path) -> None:
    config = {"drain": {"delaySeconds": 0.5}}
    async with (
        engine("--step-seconds", "0.02") as (_, one),
        workers(2, {**pods(one["url"]), **config}, tmp_path) as fleet,
    ):
        streams = [asyncio.create_task(fleet.ask(i, stream=True, max_tokens=100)) for i in range(12)]

        async def all_run() -> bool:
            return await fleet.metric('matrixinfer_in_flight{pod="pod-0"}') == 12

        await eventually(all_run, pause=0.1)
        children = fleet.children()
        fleet.process.send_signal(signal.SIGTERM)
        assert await asyncio.gather(*streams) == [200] * 12
        async with asyncio.timeout(DEADLINE_SECONDS):
            await fleet.process.wait()
        assert fleet.process.returncode == 0
        assert not any(map(_is_running, children))


async def test_workers_end_with_their_supervisor(tmp_path: Path) -> None:
    async with workers(2, {**pods("http://127.0.0.1:1"), "drain": {"delaySeconds": 0}}, tmp_path) as fleet:
        children = fleet.children()
        fleet.process.kill()
        await eventually(lambda: not any(_is_running(each) for each in children), pause=0.1)


@pytest.mark.parametrize("count", [1, 2])
async def test_a_gateway_that_cannot_start_says_why(count: int, tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(json.dumps({**pods("http://127.0.0.1:1"), "listen": "127.0.0.1:0", "admin": "192.0.2.1:1"}))
    async with command("serve", "--config", str(file), "--workers", str(count)) as process:
        _, error = await process.communicate()
        assert process.returncode == 2
        assert b"cannot listen" in error


def _is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"
