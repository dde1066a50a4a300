"""Keys and tokens before the gateway."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from joserfc import jwk

from matrixinfer.access import identity, key_source
from tests.integration.access_support import CHAT, MESSAGES, Client, Engine, gateway, key_file
from tests.integration.gateway_support import pod
from tests.unit.access.test_tokens import document, token
from tests.waiting import eventually

KEYS = "access: {keysFile: keys.yaml}\n"
ALICE = {"name": "alice", "key": "sk-alice", "models": ["tiny"]}
BOB = {"name": "bob", "key": "sk-bob"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    key_file(tmp_path, [ALICE, BOB])
    return tmp_path


async def test_whoever_has_no_key_is_refused_in_the_words_of_the_api(folder: Path) -> None:
    engine = Engine()
    async with gateway(KEYS, engine, base=folder) as client:
        for answer in (await client.post(), await client.post("sk-mallory"), await client.post("sk-alic")):
            assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert answer.body["error"]["code"] == "invalid_api_key"
            assert answer.headers["x-request-id"]
        refused = await client.post(path=MESSAGES)
        assert (refused.status, refused.body["error"]["type"]) == (401, "authentication_error")
        assert (await client.get("/v1/models")).status == 401
        assert (await client.get("/v1/models/tiny", **{"anthropic-version": "x"})).body["type"] == "error"
        assert [(await client.get(path)).status for path in ("/health", "/ready")] == [200, 200]
        metrics = (await client.get("/metrics")).body
    assert 'matrixinfer_access_refused_total{reason="unauthenticated"} 6.0' in metrics
    assert 'matrixinfer_requests_total{code="401",model="unknown"} 4.0' in metrics
    assert engine.heads == []


@pytest.mark.parametrize(
    "header",
    [
        {"Authorization": "Bearer sk-bob"},
        {"authorization": "bearer  sk-bob"},
        {"X-Api-Key": "sk-bob"},
        {"api-key": "sk-bob"},
    ],
)
async def test_a_key_opens_the_door_and_stays_there(folder: Path, header: dict[str, str]) -> None:
    engine = Engine()
    config = "access: {keysFile: keys.yaml, stripHeaders: [X-Tenant-Admin]}\n"
    async with gateway(config, engine, base=folder) as client:
        sent = header | {"Cookie": "a=b", "x-tenant-admin": "1", "x-other": "stays"}
        assert (await client.post(headers=sent)).status == 200
    (head,) = engine.heads
    assert not {"authorization", "x-api-key", "api-key", "cookie", "x-tenant-admin"} & {name.lower() for name in head}
    assert head["x-other"] == "stays"


@pytest.mark.parametrize(
    "header",
    [{"Authorization": "Basic sk-bob"}, {"Authorization": "sk-bob"}, {"Authorization": "Bearer "}, {"X-Api-Key": ""}],
)
async def test_credentials_of_another_kind_are_none(folder: Path, header: dict[str, str]) -> None:
    async with gateway(KEYS, Engine(), base=folder) as client:
        assert (await client.post(headers=header)).status == 401


async def test_two_different_credentials_are_refused(folder: Path) -> None:
    async with gateway(KEYS, Engine(), base=folder) as client:
        url = client.service.gateway.url + CHAT
        headers = [("Authorization", "Bearer sk-mallory"), ("Authorization", "Bearer sk-bob")]
        async with client.session.post(url, json={}, headers=headers) as response:
            assert response.status == 401


async def test_a_key_has_its_models(folder: Path) -> None:
    async with gateway(KEYS, Engine("tiny"), Engine("big"), base=folder) as client:
        assert (await client.post("sk-alice")).status == 200
        refused = await client.post("sk-alice", model="big")
        assert (refused.status, refused.body["error"]["code"]) == (403, "model_not_allowed")
        unknown = await client.post("sk-alice", model="no-such-model")  # nothing tells which others there are
        assert unknown.body["error"]["code"] == refused.body["error"]["code"]
        refused = await client.post("sk-alice", path=MESSAGES, model="big")
        assert (refused.status, refused.body["error"]["type"]) == (403, "permission_error")
        assert (await client.post("sk-bob", model="big")).status == 200

        async def listed(key: str) -> list[str]:
            return [model["id"] for model in (await client.get("/v1/models", key)).body["data"]]

        assert await listed("sk-alice") == ["tiny"]
        assert await listed("sk-bob") == ["big", "tiny"]
        assert (await client.get("/v1/models/big", "sk-alice")).status == 404


async def test_keys_come_and_go_with_their_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "REREAD_SECONDS", 0.005)
    async with gateway(KEYS, Engine(), base=folder) as client:
        key_file(folder, [{"name": "carol", "key": "sk-carol"}])

        async def has_changed() -> bool:
            return (await client.post("sk-carol")).status == 200

        await eventually(has_changed)
        assert (await client.post("sk-bob")).status == 401
        (folder / "keys.yaml").write_text("keys: [{name: broken}]")
        (folder / "other").write_text("")
        assert (await client.post("sk-carol")).status == 200
        key_file(folder, [BOB])

        async def is_back() -> bool:
            return (await client.post("sk-bob")).status == 200

        await eventually(is_back)


async def test_nothing_changes_without_access(tmp_path: Path) -> None:
    engine = Engine()
    async with gateway("", engine, base=tmp_path) as client:
        assert (await client.post("anything", headers={"Cookie": "a=b"})).status == 200
    assert (engine.heads[0]["Authorization"], engine.heads[0]["Cookie"]) == ("Bearer anything", "a=b")


class Provider:
    """Serves the keys of an identity provider, while it has some."""

    def __init__(self, *keys: jwk.ECKey) -> None:
        self.keys = keys
        self.asked = 0

    async def __call__(self, _: web.BaseRequest) -> web.StreamResponse:
        self.asked += 1
        return web.Response(body=document(*self.keys), status=200 if self.keys else 500)


def with_tokens(url: str) -> str:
    return f"access: {{keysFile: keys.yaml, jwt: {{issuer: 'https://idp', audience: [gateway], jwksUrl: '{url}/jwks', modelsClaim: models}}}}\n"


async def post(client: Client, key: jwk.ECKey, kid: str, **claims: object) -> int:
    said: dict[str, Any] = {"exp": 4_000_000_000, "models": ["tiny"]} | claims
    return (await client.post(token(key, kid=kid, **said))).status


async def test_tokens_are_taken_beside_keys_and_new_keys_of_the_issuer_are_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_source, "PAUSE_SECONDS", 0.0)
    old, new = (jwk.ECKey.generate_key("P-256", {"kid": name}) for name in ("old", "new"))
    provider = Provider(old)
    async with pod(provider) as url, gateway(with_tokens(url), Engine(), base=folder) as client:
        assert (await client.post("sk-bob")).status == 200
        assert await post(client, old, "old") == 200
        assert await post(client, old, "old", models=["big"]) == 403
        assert await post(client, old, "old", aud="elsewhere") == 401
        assert await post(client, old, "old", exp=1) == 401
        assert await post(client, new, "old") == 401
        provider.keys = (new,)
        assert await post(client, new, "new") == 200
        assert await post(client, old, "old") == 401
        asked = provider.asked
        assert await post(client, new, "new") == 200
        assert provider.asked == asked


async def test_tokens_get_503_and_keys_are_taken_while_the_issuer_s_keys_are_unknown(folder: Path) -> None:
    key = jwk.ECKey.generate_key("P-256", {"kid": "k"})
    async with pod(Provider()) as url, gateway(with_tokens(url), Engine(), base=folder) as client:
        answer = await client.post(token(key, kid="k", exp=4_000_000_000))
        assert (answer.status, answer.body["error"]["code"]) == (503, "keys_unavailable")
        assert answer.headers["Retry-After"]
        assert (await client.post("sk-bob")).status == 200


@pytest.mark.parametrize(
    "fields",
    [
        b"Authorization: Bearer \xff\xfe",
        b"Authorization: Bearer \xff.\xfe.\xfd",
        b"Authorization: Bearer " + "é.é.é".encode(),
        b"Authorization: Bearer a.b.c",
        b"Authorization: Bearer " + b"a." * 3000 + b"a",
        b"Authorization: Bearer eyJhbGciOiJub25lIn0.e30.",
        b"Authorization: Bearer eyJhbGciOiJFUzI1NiIsImtpZCI6WzFdfQ.e30.AAAA",
        b"Authorization: Bearer " + b"W1tb" * 2000 + b".e30.AAAA",
        b"Authorization:",
        b"x-api-key: \xff",
        b"x-api-key: a\r\nx-api-key: sk-bob",
    ],
)
async def test_whatever_is_sent_as_a_credential_is_answered_with_401(folder: Path, fields: bytes) -> None:
    key = jwk.ECKey.generate_key("P-256", {"kid": "k"})
    async with pod(Provider(key)) as url, gateway(with_tokens(url), Engine(), base=folder) as client:
        host, port = client.service.gateway.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = b'{"model":"tiny","messages":[{"role":"user","content":"x"}]}'
        head = b"POST %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%b\r\nContent-Length: %d\r\n\r\n"
        writer.write(head % (CHAT.encode(), fields, len(body)) + body)
        answer = await reader.read()
        writer.close()
    assert answer.startswith(b"HTTP/1.1 401 "), answer[:300]
