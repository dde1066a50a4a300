"""Keys and tenants on the paths that bring no prompt."""

from __future__ import annotations

import asyncio
import json
import secrets
from pathlib import Path
from typing import Any

import pytest
from aiohttp import FormData, web
from yarl import URL

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
        return web.json_response({}, status=self.status)


class Remembers(Engine):
    """Stores responses under the ids that requests ask for, as vLLM and SGLang do."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/v1/responses":
            body = json.loads(await request.read())
            if body.get("previous_response_id", next(iter(self.ids), None)) not in {None, *self.ids}:
                return web.json_response({}, status=404)
            self.ids.add(body["request_id"])
            return web.json_response({"id": body["request_id"], "output": []})
        if request.path.startswith("/v1/responses/"):
            found = request.path.rpartition("/")[2]
            return web.json_response({"id": found}, status=200 if found in self.ids else 404)
        return await super().__call__(request)


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
        assert (await client.post("sk-ann", path="/v1/responses", input="hello")).status == 200
        assert (await client.get("/v1/responses/resp_1", "sk-ann")).status == 200
        assert (await client.get("/v1/responses/resp_2", "sk-ann")).status == 404
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


async def test_nobody_goes_on_with_the_response_of_another_tenant(folder: Path) -> None:
    async with gateway(KEYS, Stores(), base=folder) as client:
        assert (await client.post("sk-ann", path="/v1/responses", input="hello")).status == 200
        more: Any = {"path": "/v1/responses", "input": "and?", "previous_response_id": "resp_1"}
        assert (await client.post("sk-bob", **more)).status == 404
        assert (await client.post("sk-ann", **more)).status == 200


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"kv_transfer_params": {"do_remote_prefill": True, "remote_block_ids": [1]}}),
        ("/v1/responses", {"kv_transfer_params": {"remote_host": "x"}, "input": "x"}),
        ("/v1/completions", {"ec_transfer_params": {"x": 1}, "prompt": "x"}),
        ("/v1/completions", {"bootstrap_host": "10.0.0.1", "prompt": "x"}),
        ("/v1/completions", {"session_params": {"id": "ann"}, "prompt": "x"}),
        ("/inference/v1/generate", {"token_ids": [1], "features": {"mm_hashes": {"image": ["h"]}}}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url", "uuid": "u"}]}]}),
        ("/v1/chat/completions/batch", {"messages": [[{"role": "user", "content": [{"type": "audio", "uuid": "u"}]}]]}),
    ],
)
async def test_nothing_leads_past_the_salt(folder: Path, path: str, fields: dict[str, Any]) -> None:
    engine = Stores()
    async with gateway(ISOLATED, engine, base=folder) as client:
        answer = await client.post("sk-ann", path=path, **fields)
        assert answer.status == 400
        assert "tenants" in answer.body["error"]["message"]
        written = (
            json.dumps({"model": "tiny", **fields}).replace("_params", "\\u005fparams").replace("uuid", "u\\u0075id")
        )
        assert await send(client, path, written.encode()) == 400
        if "messages" not in fields:
            unused = dict.fromkeys(fields) | {key: "x" for key in ("input", "prompt") if key in fields}
            assert (await client.post("sk-ann", path=path, **unused)).status == 200


async def test_where_no_engine_takes_a_salt_tenants_get_no_answer(folder: Path) -> None:
    engine = Stores()
    async with gateway(ISOLATED, engine, base=folder) as client:
        assert await send(client, "/v2/embed", b'{"texts":["x"]}') == 503
    assert engine.raw == []


async def test_isolated_tenants_cannot_choose_the_ids_of_responses(folder: Path) -> None:
    engine = Engine()
    async with gateway(ISOLATED, engine, base=folder) as client:
        assert (await client.post("sk-ann", path="/v1/responses", input="x", request_id="resp_of_bob")).status == 200
        assert (await client.post("sk-ann", input="x", request_id="mine")).status == 200
    made, own = (body["request_id"] for body in engine.bodies)
    assert made != "resp_of_bob"
    assert made.startswith("resp_")
    assert own == "mine"


@pytest.mark.parametrize("text", [KEYS, ISOLATED])
async def test_a_response_stays_with_its_tenant_at_gateways_that_have_not_passed_it_on(
    folder: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "token_bytes", lambda count=32: b"s" * count)  # as workers have it in common
    engine = Remembers()
    async with gateway(text, engine, base=folder) as first, gateway(text, engine, base=folder) as second:
        made = await first.post("sk-ann", path="/v1/responses", input="my request_id")
        more: Any = {"path": "/v1/responses", "input": "and?", "previous_response_id": made.body["id"]}
        assert [(await second.post(key, **more)).status for key in ("sk-bob", "sk-ann")] == [404, 200]
        page = f"/v1/responses/{made.body['id']}"
        assert [(await second.get(page, key)).status for key in ("sk-bob", "sk-ann")] == [404, 200]
        assert [(await first.get(page, key)).status for key in ("sk-bob", "sk-ann")] == [404, 200]


@pytest.mark.parametrize(("text", "status"), [(KEYS, 200), (ISOLATED, 404)])
async def test_a_response_of_unknown_origin_is_nobody_s_only_where_tenants_are_kept_apart(
    folder: Path, text: str, status: int
) -> None:
    engine = Remembers()
    engine.ids.add("resp_old")
    async with gateway(text, engine, base=folder) as client:
        assert (await client.get("/v1/responses/resp_old", "sk-ann")).status == status
        more: Any = {"path": "/v1/responses", "input": "and?", "previous_response_id": "resp_old"}
        assert (await client.post("sk-ann", **more)).status == status
        chosen = await client.post("sk-ann", path="/v1/responses", input="x", request_id="resp_mine")
        assert (chosen.body["id"] == "resp_mine") is (text == KEYS)


async def test_adapters_count_as_requests_and_wait_like_others(tmp_path: Path) -> None:
    key_file(tmp_path, [{"name": "ann", "key": "sk-ann"}])
    text = "access: {keysFile: keys.yaml, limits: {requests: 2}}\nadmission: {maxConcurrentRequests: 1}\n"
    text += "accessLog: {path: access.jsonl}\n"
    first, second, path = Stores(), Stores(), "/v1/load_lora_adapter"
    async with gateway(text, first, second, base=tmp_path) as client:
        assert await send(client, path, b"{}", "sk-mallory") == 401
        body: Any = {"path": path, "lora_name": "x"}
        answers = await asyncio.gather(*(client.post("sk-ann", **body) for _ in range(3)))
        assert sorted(answer.status for answer in answers) == [200, 200, 429]
        assert {answer.headers["x-ratelimit-limit-requests"] for answer in answers} == {"2"}
        assert await client.metric('matrixinfer_requests_total{code="200",model="unknown"}') == 2
        assert await client.metric("matrixinfer_admission_wait_seconds_count") == 2
        assert await client.metric('matrixinfer_admission_requests{state="running"}') == 0
    assert (len(first.raw), len(second.raw)) == (2, 2)
    lines = [json.loads(line) for line in (tmp_path / "access.jsonl").read_text().splitlines()]
    assert sorted((each["status"], each.get("caller")) for each in lines if each["path"] == path) == sorted(
        [(401, None), (200, "ann"), (200, "ann"), (429, "ann")], key=str
    )


async def test_adapters_that_no_engine_loads_count_nothing(tmp_path: Path) -> None:
    key_file(tmp_path, [{"name": "ann", "key": "sk-ann"}])
    engine, path = Stores(), "/v1/load_lora_adapter"
    engine.status = 500
    text = "access: {keysFile: keys.yaml, limits: {requests: 1}}\n"
    async with gateway(text, engine, base=tmp_path) as client:
        assert [await send(client, path, b'{"lora_name":"x"}') for _ in range(2)] == [500, 500]
        engine.status = 200
        assert [await send(client, path, b'{"lora_name":"x"}') for _ in range(2)] == [200, 429]


async def test_a_key_for_some_models_changes_only_their_adapters(tmp_path: Path) -> None:
    key_file(tmp_path, [{"name": "ann", "key": "sk-ann", "models": ["hers"]}, {"name": "root", "key": "sk-root"}])
    engine, path = Stores(), "/v1/unload_lora_adapter"
    async with gateway(KEYS, engine, base=tmp_path) as client:
        assert await send(client, path, b'{"lora_name":"his"}') == 403
        assert await send(client, path, b'{"lora_name":"hers","lora_name":"his"}') == 403
        assert await send(client, path, '{"lora_name":"his"}'.encode("utf-16")) == 400
        assert await send(client, path, b"{}") == 400
        assert engine.raw == []
        assert await send(client, path, b'{"lora_name":"hers"}') == 200
        assert await send(client, path, b'{"lora_name":"his"}', "sk-root") == 200


async def test_a_key_for_some_models_reaches_no_other_by_an_odd_body(tmp_path: Path) -> None:
    key_file(tmp_path, [{"name": "ann", "key": "sk-ann", "models": ["tiny"]}])
    engine = Stores()
    async with gateway(KEYS, engine, base=tmp_path) as client:
        for body in (
            b" " * 1000 + b'{"model":"large"}',
            '{"model":"large"}'.encode("utf-16"),
            b'\xef\xbb\xbf{"model":"large"}',
            b"model=large",
        ):
            assert await send(client, "/pooling?model=tiny", body) == 403
        twice = FormData([("model", "tiny"), ("model", "large")])
        twice.add_field("file", b"audio", filename="a.wav")
        assert await send(client, "/v1/audio/transcriptions", twice) == 403
        assert engine.raw == []
        once = FormData([("model", "tiny")])
        once.add_field("file", b"audio", filename="a.wav")
        assert await send(client, "/v1/audio/transcriptions", once) == 200


async def test_a_path_with_dots_behind_an_encoded_slash_is_unknown(folder: Path) -> None:
    async with gateway(KEYS, Stores(), base=folder) as client:
        for path in ("/v1/responses/mine%2F..%2Fresp_1", "/v1/responses/x/%2e%2e%5cresp_1"):
            url = URL(client.service.gateway.url + path, encoded=True)
            async with client.session.get(url, headers={"Authorization": "Bearer sk-bob"}) as response:
                assert response.status == 404
                assert "Invalid URL" in await response.text()
