"""What browsers are told: nothing by default, and with `api.cors` just what it says, whatever the answer is."""

from __future__ import annotations

from aiohttp import web

from matrixinfer.config import ApiConfig, CorsConfig
from tests.integration.gateway_support import CHAT, Rig, ok, pod, rig

PAGE = "https://chat.example.com"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


def front(**settings: object) -> ApiConfig:
    return ApiConfig(cors=CorsConfig(**{"origins": (PAGE,), **settings}))  # type: ignore[arg-type]


async def options(gateway: Rig, path: str = CHAT, **changes: str) -> tuple[int, dict[str, str]]:
    headers = {name: value for name, value in {**PREFLIGHT, **changes}.items() if value}
    async with gateway.client.options(gateway.url + path, headers=headers) as response:
        assert await response.read() == b"" or response.status >= 400
        return response.status, dict(response.headers)


async def test_by_default_nothing_is_said_and_options_is_refused() -> None:
    async with pod(ok) as url, rig(url) as gateway:
        status, headers = await options(gateway)
        assert status == 405
        assert not any(name.lower().startswith("access-control") for name in headers)
        async with gateway.post(headers={"Origin": PAGE}) as response:
            assert "Vary" not in response.headers
            assert "Access-Control-Allow-Origin" not in response.headers


async def test_a_preflight_says_what_is_allowed() -> None:
    async with pod(ok) as url, rig(url, front=front(max_age_seconds=60)) as gateway:
        status, headers = await options(gateway)
    assert status == 204
    assert headers["Access-Control-Allow-Origin"] == PAGE
    assert headers["Access-Control-Allow-Methods"] == "POST"
    assert headers["Access-Control-Allow-Headers"] == "authorization,content-type"
    assert headers["Access-Control-Max-Age"] == "60"
    assert headers["Vary"] == "Access-Control-Request-Method, Access-Control-Request-Headers, Origin"
    assert "Access-Control-Allow-Credentials" not in headers


async def test_a_preflight_of_another_origin_allows_nothing() -> None:
    async with pod(ok) as url, rig(url, front=front()) as gateway:
        for origin in ("https://evil.example.com", "null", f"{PAGE}.evil.com", PAGE.upper()):
            _, headers = await options(gateway, Origin=origin)
            assert not any(name.lower().startswith("access-control") for name in headers), origin


async def test_headers_may_be_listed() -> None:
    async with pod(ok) as url, rig(url, front=front(headers=("content-type",))) as gateway:
        assert (await options(gateway))[1]["Access-Control-Allow-Headers"] == "content-type"


async def test_options_that_is_no_preflight_is_a_wrong_method() -> None:
    async with pod(ok) as url, rig(url, front=front()) as gateway:
        status, headers = await options(gateway, **{"Access-Control-Request-Method": ""})
        assert (status, headers["Access-Control-Allow-Origin"]) == (405, PAGE)
        assert (await options(gateway, "/nowhere"))[0] == 404


async def test_answers_errors_and_streams_alike_may_be_read_by_the_page_alone() -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        headers = {"Content-Type": "text/event-stream", "Access-Control-Allow-Origin": "*", "Vary": "Accept"}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        return response

    async with pod(answer) as url, rig(url, front=front(credentials=True)) as gateway:
        for body, path, status in ((None, CHAT, 200), (b"{", CHAT, 400), (None, "/nowhere", 404)):
            sent = {} if body is None else {"body": body}
            async with gateway.post(path=path, headers={"Origin": PAGE}, **sent) as response:
                assert response.status == status
                assert response.headers.getall("Access-Control-Allow-Origin") == [PAGE]
                assert response.headers["Access-Control-Allow-Credentials"] == "true"
                exposed = response.headers["Access-Control-Expose-Headers"].split(", ")
                assert {"x-request-id", "x-matrixinfer-pod", "retry-after"} <= set(exposed)
                assert response.headers["Vary"].endswith("Origin")
        async with gateway.post() as response:  # no browser, but a cache may keep the answer for one
            assert "Origin" in response.headers["Vary"]
            assert "Access-Control-Allow-Origin" not in response.headers


async def test_every_origin_may_be_allowed() -> None:
    async with (
        pod(ok) as url,
        rig(url, front=front(origins=("*",))) as gateway,
        gateway.post(headers={"Origin": "https://any.example.com"}) as response,
    ):
        assert response.headers["Access-Control-Allow-Origin"] == "*"
        assert "Vary" not in response.headers


async def test_the_admin_listener_says_nothing_to_pages() -> None:
    async with (
        pod(ok) as url,
        rig(url, front=front()) as gateway,
        gateway.client.get(f"{gateway.admin_url}/health", headers={"Origin": PAGE}) as response,
    ):
        assert "Access-Control-Allow-Origin" not in response.headers
