"""Admin pages: what they refuse."""

from __future__ import annotations

from typing import Any, cast

import pytest
from aiohttp.test_utils import make_mocked_request

from matrixinfer.errors import InvalidRequest
from matrixinfer.gateway.handlers import Admin
from matrixinfer.routing.decision_log import DecisionLog


def admin() -> Admin:
    unused = cast("Any", None)
    return Admin(unused, unused, DecisionLog(1), unused, unused, unused, unused)


@pytest.mark.parametrize("limit", ["", "-1", "1.5", "all", "9" * 10, "9" * 5000])
async def test_a_limit_that_is_no_sane_number_is_refused(limit: str) -> None:
    with pytest.raises(InvalidRequest, match="limit: expected a number of up to 9 digits"):
        await admin().decisions(make_mocked_request("GET", f"/debug/decisions?limit={limit}"))


async def test_a_limit_may_exceed_what_is_kept() -> None:
    answer = await admin().decisions(make_mocked_request("GET", "/debug/decisions?limit=999999999"))
    assert answer.status == 200
