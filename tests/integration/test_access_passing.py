"""Keys and tenants on the paths that bring no prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from aiohttp import FormData, web

from tests.integration.access_support import Answer, Client, Engine, gateway, key_file

ISOLATED = "access: {keysFile: keys.yaml, isolation: {secretFile: secret}}\n"
KEYS = "access: {keysFile: keys.yaml}\n"


class Stores(Engine):
    """Also answers what is asked about responses, and takes bodies that are not JSON."""

    def __init__(self) -> None:
        super().__init__()
        self.raw: list[tuple[str, bytes]] = []

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/v1/responses":
            await request.read()
            return web.json_response({"id": "resp_1", "output": []})
        if request.path.startswith("/v1/responses/"):
            return web.json_response({"id": "resp_1"}, status=200 if request.path.endswith("resp_1") else 404)
        if request.path in ("/v1/models", "/health", "/metrics") or request.method == "GET":
            return await super().__call__(request)
        self.heads.append(request.headers.copy())
        self.raw.append((request.path, await request.read()))
        return web.json_response({})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    key_file(tmp_path, [{"name": "ann", "key": "sk-ann"}, {"name": "bob", "key": "sk-bob"}])
    (tmp_path / "secret").write_text("s" * 40)
    return tmp_path


async def send(client: Client, path: str, data: bytes | FormData, key: str = "sk-ann") -> int:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with client.session.post(client.service.gateway.url + path, data=data, headers=headers) as response:
        return response.status


@pytest.mark.parametrize("path", ["/tokenize", "/pooling", "/v1/audio/transcriptions", "/v1/load_lora_adapter"])
async def test_they_need_a_key_and_the_engine_does_not_get_it(folder: Path, path: str) -> None:
    engine = Stores()
    async with gateway(KEYS, engine, base=folder) as client:
        assert await send(client, path, b"{}", key="") == 401
        assert await send(client, path, b"{}", key="sk-mallory") == 401
        assert engine.raw == []
        assert await send(client, path, b"{}") == 200
    assert "Authorization" not in engine.heads[0]


async def test_a_response_stays_with_its_tenant(folder: Path) -> None:
    async with gateway(KEYS, Stores(), base=folder) as client:

        async def get(key: str, name: str) -> Answer:
            return await client.get(f"/v1/responses/{name}", key)

        assert (await client.post("sk-ann", path="/v1/responses", input="hello")).status == 200
        assert (await get("sk-ann", "resp_1")).status == 200
        foreign, unknown = await get("sk-bob", "resp_1"), await get("sk-bob", "resp_2")
        assert (foreign.status, unknown.status) == (404, 404)
        assert foreign.body["error"]["code"] == unknown.body["error"]["code"]


async def test_what_may_take_a_prompt_is_salted_and_nothing_else_is_changed(folder: Path) -> None:
    engine = Stores()
    async with gateway(ISOLATED, engine, base=folder) as client:
        for key in ("sk-ann", "sk-bob"):
            assert await send(client, "/pooling", b'{"input":"x","cache_salt":"mine"}', key) == 200
        assert await send(client, "/tokenize", b'{"prompt":"x"}') == 200
        form = FormData()
        form.add_field("file", b"audio", filename="a.wav")
        assert await send(client, "/v1/audio/transcriptions", form) == 200
        assert (await client.get("/v1/responses/resp_1", "sk-ann")).status == 200
    salts = [json.loads(body).get("cache_salt") for path, body in engine.raw if path == "/pooling"]
    assert len(set(salts)) == 2
    assert "mine" not in salts
    assert engine.raw[2] == ("/tokenize", b'{"prompt":"x"}')
    assert b"cache_salt" not in engine.raw[3][1]


@pytest.mark.parametrize(
    "body",
    [
        '{"input":"x"}'.encode("utf-16"),
        '{"input":"x"}'.encode("utf-16-le"),
        b'\xef\xbb\xbf{"input":"x"}',
        b"[1]",
        b'{"input":"x"',
        b"input=x",
    ],
)
async def test_no_other_encoding_slips_past_the_salt(folder: Path, body: bytes) -> None:
    engine = Stores()
    async with gateway(ISOLATED, engine, base=folder) as client:
        assert await send(client, "/pooling", body) == 400
        assert await send(client, "/pooling", b" " * 500 + b'{"input":"x"}') == 200
    assert [b"cache_salt" in body for _, body in engine.raw] == [True]
