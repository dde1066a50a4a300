"""Errors as clients of the OpenAI API expect them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from aiohttp import web

from matrixinfer.errors import (
    BodyTimeout,
    InvalidRequest,
    MatrixInferError,
    NoPodAvailable,
    PayloadTooLarge,
    PodTimeout,
    PodUnreachable,
    RequestError,
    UnknownModel,
)

RETRY_AFTER_SECONDS = 1

_STATUS: dict[type[MatrixInferError], tuple[int, str | None]] = {
    InvalidRequest: (400, None),
    UnknownModel: (404, "model_not_found"),
    BodyTimeout: (408, "request_timeout"),
    PayloadTooLarge: (413, "request_too_large"),
    PodUnreachable: (502, "pod_unreachable"),
    NoPodAvailable: (503, "no_pod_available"),
    PodTimeout: (504, "pod_timeout"),
}


def error_response(
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> web.Response:
    """An error in the OpenAI API's shape; its `type` follows from the status."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})
    response = web.Response(status=status, body=body, headers=headers)
    response.headers["Content-Type"] = "application/json"
    return response


def response_to(error: MatrixInferError) -> web.Response:
    """What the client is told when its request raised `error`."""
    status, code = next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), (500, None))
    if isinstance(error, RequestError):
        response = error_response(status, error.message, code=code, param=error.param)
    elif status == 500:
        response = error_response(status, "Internal error.")
    else:
        response = error_response(status, str(error), code=code)
    if status == 503:
        response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if status in (408, 413):
        # The rest of the body will not be read, so nothing can follow on this connection.
        response.force_close()
    return response
