"""Paths of engines that bring no prompt to route by: one engine answers, or, for adapters, every engine."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from urllib.parse import unquote

from aiohttp import web

from matrixinfer.config import ENGINE_PATHS, OTHER_METHODS
from matrixinfer.gateway.errors import error_response
from matrixinfer.gateway.listener import Handler, Routes
from matrixinfer.prompt import opaque
from matrixinfer.prompt.anthropic import MESSAGES_PATH
from matrixinfer.prompt.requests import Reader
from matrixinfer.prompt.responses import RESPONSES_PATH

STORED_PATH = f"{RESPONSES_PATH}/"
_STORED = re.compile(re.escape(STORED_PATH) + r"([^/]{1,768})(?:/.*)?")
ADAPTER_PATHS = frozenset(
    {"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter", "/unload_lora_adapter"}
)
"""Every engine has adapters of its own, so each of them is asked."""


class Passing:
    """Passes requests to these `paths` on to an engine. `dispatch` does it; `fan_out` asks all engines."""

    def __init__(
        self,
        paths: Sequence[str],
        dispatch: Callable[[web.BaseRequest, Reader], Awaitable[web.StreamResponse]],
        fan_out: Handler,
    ) -> None:
        self._paths = paths
        self._dispatch = dispatch
        self._fan_out = fan_out

    def routes(self) -> Routes:
        """The paths, the longest first: of those that stand for all below them the most exact one counts."""
        longest_first = sorted(self._paths, key=len, reverse=True)
        return {path: dict.fromkeys(ENGINE_PATHS.get(path, OTHER_METHODS), self._of(path)) for path in longest_first}

    def _of(self, path: str) -> Handler:
        if path in ADAPTER_PATHS:
            return self._fan_out
        return self.stored if path == STORED_PATH else self.one

    async def one(self, request: web.BaseRequest) -> web.StreamResponse:
        """Pass a request to the engine that has the least to do."""
        query = request.rel_url.query
        read = partial(opaque.read, content_type=request.headers.get("Content-Type", ""), query=dict(query))
        return await self._pass_on(request, read)

    async def stored(self, request: web.BaseRequest) -> web.StreamResponse:
        """Pass a request about a stored response to the engine that stores it."""
        found = _STORED.fullmatch(request.rel_url.raw_path)
        if found is None:
            return _unknown(request)
        identity = unquote(found[1])
        return await self._pass_on(request, lambda path, body: opaque.opaque(path, len(body), response_id=identity))

    async def _pass_on(self, request: web.BaseRequest, read: Reader) -> web.StreamResponse:
        if {".", ".."} & set(re.split(r"[/\\]", unquote(request.rel_url.raw_path))):
            return _unknown(request)  # a server may resolve it to a path that is not listed
        if request.method == "HEAD":
            path = request.rel_url.raw_path
            return error_response(
                405, f"HEAD is not passed on to engines: use GET with {path}.", headers={"Allow": "GET"}
            )
        return await self._dispatch(request, read)


def _unknown(request: web.BaseRequest) -> web.StreamResponse:
    path = request.rel_url.raw_path
    return error_response(404, f"Invalid URL ({request.method} {path}).", anthropic=path.startswith(MESSAGES_PATH))
