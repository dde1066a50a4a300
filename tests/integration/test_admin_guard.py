"""Who may use the admin listener."""

from __future__ import annotations

import pytest

from tests.integration.gateway_support import rig

ROUTE = "/debug/route"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1", 200),
        ("[::1]:1", 200),
        ("localhost", 200),
        ("gateway:8081", 200),
        ("", 403),
        ("gateway.ops", 200),
        ("evil.example", 403),
        ("[x", 403),
    ],
)
async def test_a_name_that_nobody_configured_is_refused(host: str, status: int) -> None:
    async with (
        rig(admin_names=("Gateway.ops",)) as gateway,
        gateway.client.get(gateway.admin_url + "/debug/pods", headers={"Host": host}) as response,
    ):
        assert response.status == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
async def test_a_post_from_another_site_is_refused(headers: dict[str, str], status: int) -> None:
    async with (
        rig() as gateway,
        gateway.client.post(gateway.admin_url + ROUTE, data=b"{}", headers=headers) as response,
    ):
        assert response.status == status


async def test_a_post_from_the_listener_s_own_page_is_taken() -> None:
    async with (
        rig() as gateway,
        gateway.client.post(gateway.admin_url + ROUTE, data=b"{}", headers={"Origin": gateway.admin_url}) as response,
    ):
        assert response.status == 200


async def test_the_api_listener_takes_any_name() -> None:
    async with (
        rig() as gateway,
        gateway.client.get(gateway.url + "/health", headers={"Host": "any.example"}) as response,
    ):
        assert response.status == 200
