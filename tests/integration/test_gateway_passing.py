"""Paths of engines that bring no prompt: what is passed on, to which pods, and with which guarantees."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web
from yarl import URL

from matrixinfer.config import ENGINE_PATHS, ApiConfig, LimitsConfig
from matrixinfer.gateway.passing import ADAPTER_PATHS
from tests.integration.gateway_support import nowhere, ok, pod, rig


class Recorder:
    """An engine that answers everything, and keeps what it got."""

    def __init__(self, status: int = 200, answer: bytes = b'{"ok":true}') -> None:
        self.status = status
        self.answer = answer
        self.seen: list[tuple[str, str, bytes]] = []
        self.headers: list[dict[str, str]] = []

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        self.seen.append((request.method, request.raw_path, await request.read()))
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        return web.Response(status=self.status, body=self.answer, headers={"Content-Type": "application/json"})


async def test_every_listed_path_reaches_an_engine_as_it_came() -> None:
    engine = Recorder()
    paths = [path for path in ENGINE_PATHS if path not in ADAPTER_PATHS and not path.endswith("/")]
    async with pod(engine) as url, rig(url) as gateway:
        for path in paths:
            method = ENGINE_PATHS[path][0]
            body = b"" if method == "GET" else b'{"model":"tiny",  "x":1.50}'
            async with gateway.client.request(method, f"{gateway.url}{path}?a=1", data=body) as response:
                assert response.status == 200
                assert response.headers["x-matrixinfer-pod"] == "a"
            assert engine.seen[-1] == (method, f"{path}?a=1", body)
    assert len(engine.seen) == len(paths)
    assert all(
        "content-length" not in sent for sent, seen in zip(engine.headers, engine.seen, strict=True) if seen[0] == "GET"
    )


@pytest.mark.parametrize("path", ["/sleep", "/collective_rpc", "/v1/audio", "/tokenize/x", "/reset_prefix_cache"])
async def test_a_path_that_is_not_listed_is_unknown(path: str) -> None:
    engine = Recorder()
    async with pod(engine) as url, rig(url) as gateway, gateway.post(path=path) as response:
        assert response.status == 404
    assert engine.seen == []


async def test_the_list_can_be_changed() -> None:
    engine = Recorder()
    front = ApiConfig(paths=("/mine/", "/mine/special"))
    async with pod(engine) as url, rig(url, front=front) as gateway:
        for method, path, status in (
            ("PUT", "/mine/a/b", 200),
            ("PATCH", "/mine/special", 200),
            ("GET", "/mine/special", 200),
            ("HEAD", "/mine/special", 405),
            ("OPTIONS", "/mine/special", 405),
            ("POST", "/tokenize", 404),
            ("POST", "/mine/../sleep", 404),
            ("POST", "/mine/%2e%2e/sleep", 404),
        ):
            url_as_written = URL(gateway.url + path, encoded=True)
            async with gateway.client.request(method, url_as_written) as response:
                assert response.status == status, (method, path)
    assert [seen[1] for seen in engine.seen] == ["/mine/a/b", "/mine/special", "/mine/special"]


async def test_a_wrong_method_is_answered_here() -> None:
    async with pod(Recorder()) as url, rig(url) as gateway, gateway.client.get(f"{gateway.url}/tokenize") as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")


async def test_audio_is_passed_on_byte_for_byte_and_sent_again_if_a_pod_refuses() -> None:
    busy, engine = Recorder(503), Recorder()
    upload = b"--b\r\n" + bytes(range(256)) * 3000 + b"\r\n--b--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    async with (
        pod(busy) as first,
        pod(engine) as second,
        rig(first, second) as gateway,
        gateway.post(upload, "/v1/audio/transcriptions", headers=headers) as response,
    ):
        assert (response.status, response.headers["x-matrixinfer-pod"]) == (200, "b")
    assert busy.seen[0][2] == engine.seen[0][2] == upload
    assert engine.headers[0]["content-type"] == headers["Content-Type"]


async def test_a_body_need_not_be_text() -> None:
    engine = Recorder()
    raw = b"\xff\xfe\x00 no JSON"
    async with pod(engine) as url, rig(url) as gateway:
        headers = {"Content-Type": "application/octet-stream"}
        async with gateway.post(raw, "/v1/audio/speech", headers=headers) as response:
            assert response.status == 200
    assert engine.seen[0][2] == raw


async def test_limits_hold_for_uploads() -> None:
    limits = LimitsConfig(max_body_bytes=1000)
    async with (
        pod(Recorder()) as url,
        rig(url, limits=limits) as gateway,
        gateway.post(b"x" * 1001, "/v1/audio/transcriptions") as response,
    ):
        assert response.status == 413


async def test_adapters_are_loaded_everywhere_with_a_result_per_pod() -> None:
    first, second = Recorder(answer=b"Success: loaded"), Recorder(answer=b'"fine"')
    body = b'{"lora_name":"x","lora_path":"/x"}'
    async with pod(first) as a, pod(second) as b, rig(a, b) as gateway:
        async with gateway.post(body, "/v1/load_lora_adapter", headers={"Authorization": "Bearer k"}) as response:
            assert response.status == 200
            results = (await response.json())["results"]
        assert results == {"a": {"status": 200, "body": "Success: loaded"}, "b": {"status": 200, "body": "fine"}}
        assert sorted(gateway.router.changed) == ["a", "b"]
    for engine in (first, second):
        assert engine.seen == [("POST", "/v1/load_lora_adapter", body)]
        assert engine.headers[0]["authorization"] == "Bearer k"


async def test_an_adapter_that_some_pods_have_not_loaded_is_an_error_that_names_them() -> None:
    refusal = b'{"error":{"message":"no such path"}}'
    async with pod(Recorder()) as a, pod(Recorder(404, refusal)) as b, rig(a, b, nowhere()) as gateway:
        async with gateway.post(b"{}", "/v1/unload_lora_adapter") as response:
            assert response.status == 502
            answer = await response.json()
        assert answer["error"]["message"].startswith("2 of 3 pods did not do it: b, c.")
        assert answer["results"]["b"] == {"status": 404, "body": json.loads(refusal)}
        assert answer["results"]["c"] == {"status": None, "body": "the pod did not answer (connect)"}
        assert gateway.router.changed == ["a"]


async def test_a_refusal_in_which_all_pods_agree_has_their_status() -> None:
    async with (
        pod(Recorder(400)) as a,
        pod(Recorder(400)) as b,
        rig(a, b) as gateway,
        gateway.post(b"{}", "/v1/load_lora_adapter") as response,
    ):
        assert response.status == 400


async def test_which_pod_made_a_response_is_remembered_whole_or_streamed() -> None:
    async def streams(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in (b'data: {"response":{"id":"re', b'sp_2"}}\n\n', b'data: {"item":{"id":"msg_1"}}\n\n'):
            await response.write(piece)
            await asyncio.sleep(0)
        return response

    whole = Recorder(answer=b'{"id":"resp_1","output":[{"id":"msg_1"}]}')
    for engine, name in ((whole, "resp_1"), (streams, "resp_2")):
        async with pod(engine) as url, rig(url) as gateway:
            async with gateway.post(path="/v1/responses") as response:
                await response.read()
            assert gateway.router.stored.keeper_of(name) == ("a", None)
            assert len(gateway.router.stored) == 1


async def test_a_refused_request_makes_no_response() -> None:
    async with pod(Recorder(400, b'{"id":"resp_1"}')) as url, rig(url) as gateway:
        async with gateway.post(path="/v1/responses") as response:
            await response.read()
        assert len(gateway.router.stored) == 0


async def test_a_chat_is_no_stored_response() -> None:
    async with pod(ok) as url, rig(url) as gateway:
        async with gateway.post() as response:
            await response.read()
        assert len(gateway.router.stored) == 0
