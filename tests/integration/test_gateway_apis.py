"""Every API that takes a prompt is routed, and answers in its own shape."""

from __future__ import annotations

import pytest
from aiohttp import web

from matrixinfer.prompt.requests import READERS
from tests.integration.gateway_support import BODY, ok, pod, rig


async def test_every_api_reaches_a_pod_under_its_path() -> None:
    seen: list[tuple[str, bytes]] = []

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        seen.append((request.raw_path, await request.read()))
        return await ok(request)

    async with pod(handle) as url, rig(url) as gateway:
        for path in READERS:
            async with gateway.post(path=path) as response:
                assert response.status == 200
    assert seen == [(path, BODY) for path in READERS]


@pytest.mark.parametrize(
    ("path", "keys", "error_keys"),
    [
        ("/v1/messages?beta=true", {"type", "error"}, {"type", "message"}),
        ("/v1/messages/count_tokens", {"type", "error"}, {"type", "message"}),
        ("/v1/responses", {"error"}, {"message", "type", "param", "code"}),
    ],
)
async def test_an_error_has_the_shape_of_its_api(path: str, keys: set[str], error_keys: set[str]) -> None:
    async with pod(ok) as url, rig(url) as gateway, gateway.post(b"{nope", path) as response:
        assert response.status == 400
        body = await response.json()
        assert (set(body), set(body["error"])) == (keys, error_keys)
        assert body["error"]["type"] == "invalid_request_error"
