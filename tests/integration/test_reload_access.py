"""Keys, tokens, limits, tenants, the queue and routes change while requests are served: all of it, or nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from joserfc import jwk

from tests.integration.access_support import Client, Engine, gateway, key_file
from tests.integration.gateway_support import pod
from tests.unit.access.test_tokens import document, token
from tests.waiting import eventually

NEVER = 4_000_000_000
ALICE, BOB = ({"name": name, "key": f"sk-{name}"} for name in ("alice", "bob"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    key_file(tmp_path, [BOB]).rename(tmp_path / "new.yaml")
    key_file(tmp_path, [ALICE])
    return tmp_path


class Held(Engine):
    """Answers when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may = asyncio.Event()

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        await self.may.wait()
        return await super().answer(request)


def access(file: str = "keys.yaml", more: str = "") -> str:
    return f"access: {{keysFile: {file}{more}}}\n"


async def test_keys_limits_headers_and_routes_change_at_once(folder: Path) -> None:
    engine = Engine()
    async with gateway(access(), engine, base=folder) as client:
        assert (await client.post("sk-alice", headers={"x-team": "a"})).status == 200
        assert (await client.post("sk-alice", model="nice")).status == 404
        outcome = await client.reload(
            access("new.yaml", ", limits: {requests: 2}, stripHeaders: [x-team]")
            + "routes: [{name: nice, models: [nice], targets: [{model: tiny}]}]\n"
        )
        assert outcome["result"] == "applied"
        assert {"access.keysFile", "access.limits.requests", "access.stripHeaders"} <= set(outcome["changed"])
        assert (await client.post("sk-alice")).status == 401
        assert (await client.post("sk-bob", model="nice", headers={"x-team": "a"})).status == 200
        assert [("x-team" in each) for each in engine.heads] == [True, False]
        assert "nice" in [each["id"] for each in (await client.get("/v1/models", "sk-bob")).body["data"]]
        assert [(await client.post("sk-bob")).status for _ in range(2)] == [200, 429]


async def test_what_was_used_before_counts_after_a_reload(folder: Path) -> None:
    async with gateway(access(more=", limits: {requests: 3}"), Engine(), base=folder) as client:
        assert [(await client.post("sk-alice")).status for _ in range(2)] == [200, 200]
        assert (await client.reload(access(more=", limits: {requests: 2}")))["result"] == "applied"
        assert (await client.post("sk-alice")).status == 429
        assert (await client.reload(access(more=", limits: {requests: 4}")))["result"] == "applied"
        assert [(await client.post("sk-alice")).status for _ in range(3)] == [200, 200, 429]


async def test_requests_in_flight_are_settled_and_those_that_wait_keep_their_turn(folder: Path) -> None:
    engine = Held()
    limits = ", limits: {concurrentRequests: 4}"
    queue = "admission: {maxConcurrentRequests: %d, queueTimeoutSeconds: 600}\n"
    async with gateway(access(more=limits) + queue % 1, engine, base=folder) as client:
        sending = [asyncio.create_task(client.post("sk-alice")) for _ in range(4)]

        async def three_wait() -> bool:
            return await client.metric('matrixinfer_admission_requests{state="waiting"}') == 3

        await eventually(three_wait)
        tenants = ", tenants: [{name: alice, weight: 2}]"
        assert (await client.reload(access("new.yaml", limits + tenants) + queue % 3))["result"] == "applied"
        await eventually(lambda: len(engine.bodies) == 3)
        engine.may.set()
        assert [answer.status for answer in await asyncio.gather(*sending)] == [200] * 4
        assert (await client.reload(access(more=limits) + queue % 4))["result"] == "applied"
        answers = await asyncio.gather(*(client.post("sk-alice") for _ in range(4)))  # nothing stayed taken
        assert [answer.status for answer in answers] == [200] * 4


async def test_tenants_are_kept_apart_from_then_on(folder: Path) -> None:
    (folder / "secret").write_text("s" * 40)
    engine = Engine()
    async with gateway(access(), engine, base=folder) as client:
        await client.post("sk-alice")
        outcome = await client.reload(access(more=", isolation: {secretFile: secret}"))
        assert (outcome["result"], outcome["changed"]) == ("applied", ["access.isolation"])
        await client.post("sk-alice")
        await client.reload(access())
        await client.post("sk-alice")
    assert [("cache_salt" in each) for each in engine.bodies] == [False, True, False]


@pytest.mark.parametrize(
    "text",
    [
        access("broken.yaml", ", limits: {requests: 1}"),
        access("missing.yaml"),
        access(more=", isolation: {secretFile: short}"),
        access(more=", jwt: {issuer: 'https://idp', audience: [gateway], jwksUrl: 'http://127.0.0.1:1/jwks'}"),
    ],
)
async def test_nothing_changes_if_a_part_of_it_cannot_be_used(folder: Path, text: str) -> None:
    (folder / "broken.yaml").write_text("keys: [{name: broken}]")
    (folder / "short").write_text("short")
    async with gateway(access(), Engine(), base=folder) as client:
        routes = "routes: [{name: nice, models: [nice], targets: [{model: tiny}]}]\n"
        outcome = await client.reload(text + routes)
        assert (outcome["result"], outcome["generation"]) == ("failed", 1)
        assert (await client.post("sk-alice", model="nice")).status == 404
        assert [(await client.post("sk-alice")).status for _ in range(2)] == [200, 200]


async def test_what_fails_halfway_leaves_the_keys_of_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(access(), Engine(), base=folder) as client:
        fleet = client.service.pods.fleet

        def fails(source: str, found: Any) -> None:
            monkeypatch.undo()
            raise RuntimeError("a fault")

        monkeypatch.setattr(fleet, "published", fails)
        await client.reload(access("new.yaml"))
        assert ((await client.post("sk-alice")).status, (await client.post("sk-bob")).status) == (200, 401)
        assert (await client.reload(access("new.yaml")))["result"] == "applied"
        assert ((await client.post("sk-alice")).status, (await client.post("sk-bob")).status) == (401, 200)


@pytest.mark.parametrize(
    ("before", "after", "restart"),
    [
        ("", access(), ["access"]),
        (access(), "", ["access"]),
        (access(), access() + "admission: {maxConcurrentRequests: 3}\n", ["admission"]),
        (access(), access(more=", countIn: redis") + "redis: {host: 127.0.0.1}\n", ["redis", "access.countIn"]),
    ],
)
async def test_what_needs_a_restart_is_named(folder: Path, before: str, after: str, restart: list[str]) -> None:
    async with gateway(before, Engine(), base=folder) as client:
        outcome = await client.reload(after)
        assert outcome["result"] == "refused"
        assert sorted(outcome["restart"]) == sorted(restart)


async def test_tokens_are_taken_after_a_reload_while_their_issuer_is_down(folder: Path) -> None:
    key = jwk.ECKey.generate_key("P-256", {"kid": "k"})

    class Provider:
        is_up = True

        async def __call__(self, _: web.BaseRequest) -> web.StreamResponse:
            return web.Response(body=document(key), status=200 if self.is_up else 500)

    async def ask(client: Client) -> int:
        return (await client.post(token(key, kid="k", exp=NEVER))).status

    provider = Provider()
    async with pod(provider) as url:
        issuer = f", jwt: {{issuer: 'https://idp', audience: [gateway], jwksUrl: '{url}/jwks'}}"
        async with gateway(access(more=issuer), Engine(), base=folder) as client:
            assert await ask(client) == 200
            provider.is_up = False
            assert (await client.reload(access(more=f"{issuer}, limits: {{requests: 1}}")))["result"] == "applied"
            assert [await ask(client) for _ in range(2)] == [200, 429]
            elsewhere = issuer.replace("/jwks", "/other")
            assert (await client.reload(access(more=elsewhere)))["result"] == "failed"
            assert await ask(client) == 429
