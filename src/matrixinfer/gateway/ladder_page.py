"""The admin page `/debug/ladder`: why prompt tokens were not found in a cache."""

from __future__ import annotations

import re
from collections.abc import Callable

from aiohttp import web

from matrixinfer.errors import InvalidRequest
from matrixinfer.gateway.listener import Routes
from matrixinfer.gateway.responses import json_response
from matrixinfer.traffic.ladder.record import KEPT_SECONDS
from matrixinfer.traffic.ladder.rungs import Ladder

_DEFAULT_SECONDS = "3600"


class LadderPage:
    """`since` gives the ladder of the requests that have ended within so many seconds."""

    def __init__(self, since: Callable[[float], Ladder]) -> None:
        self._since = since

    def routes(self) -> Routes:
        """Paths of the admin listener."""
        return {"/debug/ladder": {"GET": self.show}}

    async def show(self, request: web.BaseRequest) -> web.StreamResponse:
        """The ladder of the last `?since=` seconds, a day at most."""
        since = request.rel_url.query.get("since", _DEFAULT_SECONDS)
        if not re.fullmatch(r"[0-9]{1,9}", since) or not int(since):
            raise InvalidRequest(
                f"since: expected a number of seconds of up to 9 digits, got `{since[:20]}`", param="since"
            )
        seconds = min(int(since), int(KEPT_SECONDS))
        return json_response({"since_seconds": seconds, "ladder": self._since(seconds)})
