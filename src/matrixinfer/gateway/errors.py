"""Error responses in the shapes that clients expect.

The OpenAI API has `{"error": {"message", "type", "param", "code"}}`, Anthropic's
`{"type": "error", "error": {"type", "message"}}`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
from aiohttp import web

from matrixinfer.errors import (
    BodyTimeout,
    Forbidden,
    InvalidRequest,
    KeysUnavailable,
    LimitExceeded,
    MatrixInferError,
    NoPodAvailable,
    Overloaded,
    PayloadTooLarge,
    PodTimeout,
    PodUnreachable,
    RequestError,
    Unauthenticated,
    UnknownModel,
    UnknownResponse,
    UnsupportedBody,
)

RETRY_AFTER_SECONDS = 1

_STATUS: dict[type[MatrixInferError], tuple[int, str | None]] = {
    InvalidRequest: (400, None),
    Unauthenticated: (401, "invalid_api_key"),
    Forbidden: (403, "model_not_allowed"),
    UnknownModel: (404, "model_not_found"),
    UnknownResponse: (404, "response_not_found"),
    BodyTimeout: (408, "request_timeout"),
    PayloadTooLarge: (413, "request_too_large"),
    UnsupportedBody: (415, "unsupported_encoding"),
    LimitExceeded: (429, "rate_limit_exceeded"),
    PodUnreachable: (502, "pod_unreachable"),
    NoPodAvailable: (503, "no_pod_available"),
    KeysUnavailable: (503, "keys_unavailable"),
    Overloaded: (503, "overloaded"),
    PodTimeout: (504, "pod_timeout"),
}

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Error types of Anthropic's API that are more specific than `invalid_request_error` and `api_error`."""


def error_response(
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
    anthropic: bool = False,
    kind: str | None = None,
) -> web.Response:
    """An error in the shape of OpenAI's or Anthropic's API; its `type` follows from the status, or is OpenAI's `kind`."""
    body: dict[str, object]
    if anthropic:
        named = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
        body = {"type": "error", "error": {"type": named, "message": message}}
    else:
        kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    response = web.Response(status=status, body=msgspec.json.encode(body), headers=headers)
    response.headers["Content-Type"] = "application/json"
    return response


def code_of(error: MatrixInferError) -> str:
    """One word for why a request failed: the `code` of OpenAI's errors, where it has one."""
    _, code = next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), (500, "internal"))
    return code or "invalid_request"


def response_to(error: MatrixInferError, *, anthropic: bool = False) -> web.Response:
    """The response to a request that raised `error`."""
    status, code = next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), (500, None))
    if isinstance(error, LimitExceeded):
        response = error_response(
            status, error.message, code=code, kind=error.kind, headers=error.headers, anthropic=anthropic
        )
    elif isinstance(error, RequestError):
        response = error_response(status, error.message, code=code, param=error.param, anthropic=anthropic)
    elif status == 500:
        response = error_response(status, "Internal error.", anthropic=anthropic)
    else:
        response = error_response(status, str(error), code=code, anthropic=anthropic)
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if status == 503:
        known = error.retry_after if isinstance(error, Overloaded) else None
        response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS if known is None else math.ceil(known))
    if status in (408, 413, 415):
        # The rest of the body is not read, so this connection cannot be used again.
        response.force_close()
    return response
