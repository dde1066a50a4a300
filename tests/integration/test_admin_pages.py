"""What the admin pages answer to questions that make no sense."""

from __future__ import annotations

import pytest

from tests.integration.gateway_support import rig


@pytest.mark.parametrize("limit", ["-1", "x", "", "1.5", "²", "9" * 10, "9" * 5000])
async def test_a_limit_that_is_no_sensible_number_is_refused(limit: str) -> None:
    async with rig() as gateway, gateway.client.get(f"{gateway.admin_url}/debug/decisions?limit={limit}") as response:
        assert response.status == 400
        answer = await response.json()
    assert answer["error"]["message"].startswith("limit: expected a number")
    assert len(answer["error"]["message"]) < 100


@pytest.mark.parametrize("limit", ["0", "000000001", "999999999"])
async def test_any_other_limit_will_do(limit: str) -> None:
    async with rig() as gateway, gateway.client.get(f"{gateway.admin_url}/debug/decisions?limit={limit}") as response:
        assert (response.status, await response.json()) == (200, {"decisions": []})


async def test_no_lookups_are_missed_in_an_index_of_ones_own() -> None:
    async with rig() as gateway, gateway.client.get(f"{gateway.admin_url}/debug/index") as response:
        assert (response.status, await response.json()) == (200, {"unmatched": None})
