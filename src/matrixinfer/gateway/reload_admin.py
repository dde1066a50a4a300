"""`POST /admin/reload`: reads the configuration again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

from matrixinfer.gateway.errors import error_response
from matrixinfer.gateway.listener import Routes
from matrixinfer.gateway.responses import json_response

_STATUS = {"applied": 200, "unchanged": 200, "refused": 409, "failed": 422}

Reload = Callable[[], Awaitable[Mapping[str, object]]]
"""Reloads, and says what became of it: at least `result`."""


class ReloadAdmin:
    """`reload` is None where the configuration was not read from anywhere."""

    def __init__(self, reload: Reload | None) -> None:
        self._reload = reload

    def routes(self) -> Routes:
        """Paths of the admin listener."""
        return {"/admin/reload": {"POST": self.reload}}

    async def reload(self, _: web.BaseRequest) -> web.StreamResponse:
        """Read the configuration again, and say what has changed."""
        if self._reload is None:
            return error_response(409, "This gateway was started without a configuration that can be read again.")
        return outcome_response(await self._reload())


def outcome_response(outcome: Mapping[str, object]) -> web.Response:
    """What became of a reload, with the status of its `result`."""
    return json_response(outcome, status=_STATUS[str(outcome["result"])])
