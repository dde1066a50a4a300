"""Requires a key for routes that do not dispatch requests."""

from __future__ import annotations

from aiohttp import web

from matrixinfer.access.callers import Caller
from matrixinfer.access.gate import Gate
from matrixinfer.errors import MatrixInferError
from matrixinfer.gateway import headers
from matrixinfer.gateway.errors import response_to
from matrixinfer.gateway.listener import Handler, Routes
from matrixinfer.prompt.anthropic import MESSAGES_PATH

_CALLER = web.RequestKey("caller", Caller)


def protected(routes: Routes, gate: Gate | None) -> Routes:
    """`routes` for callers with a key; `routes` themselves if none is needed."""
    if gate is None or not gate.identifies:
        return routes
    return {
        path: {method: _protected(handler, gate) for method, handler in methods.items()}
        for path, methods in routes.items()
    }


def caller_of(request: web.BaseRequest) -> Caller | None:
    """Who sends a request to a protected route; None where nobody is identified."""
    return request.get(_CALLER)


def is_anthropic(request: web.BaseRequest) -> bool:
    """Whether the client expects answers of Anthropic's API."""
    return request.path.startswith(MESSAGES_PATH) or "anthropic-version" in request.headers


def _protected(handler: Handler, gate: Gate) -> Handler:
    async def guard(request: web.BaseRequest) -> web.StreamResponse:
        try:
            caller = await gate.identify(request.headers)
        except MatrixInferError as error:
            response = response_to(error, anthropic=is_anthropic(request))
            response.headers[headers.REQUEST_ID] = headers.request_id(request.headers)
            if not request.content.is_eof():
                response.force_close()  # the body is not read
            return response
        if caller is not None:
            request[_CALLER] = caller
        return await handler(request)

    return guard
