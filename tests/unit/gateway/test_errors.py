from __future__ import annotations

import json

import pytest

from matrixinfer.errors import (
    BodyTimeout,
    InvalidRequest,
    MatrixInferError,
    NoPodAvailable,
    PayloadTooLarge,
    PluginError,
    PodTimeout,
    PodUnreachable,
    UnknownModel,
)
from matrixinfer.gateway.errors import response_to


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "param"),
    [
        (InvalidRequest("no", param="model"), 400, "invalid_request_error", None, "model"),
        (UnknownModel("no", param="model"), 404, "invalid_request_error", "model_not_found", "model"),
        (BodyTimeout("no"), 408, "invalid_request_error", "request_timeout", None),
        (PayloadTooLarge("no"), 413, "invalid_request_error", "request_too_large", None),
        (PodUnreachable("no"), 502, "server_error", "pod_unreachable", None),
        (NoPodAvailable("no"), 503, "server_error", "no_pod_available", None),
        (PodTimeout("no"), 504, "server_error", "pod_timeout", None),
    ],
)
def test_every_error_has_its_status_and_the_api_s_shape(
    error: MatrixInferError, status: int, kind: str, code: str | None, param: str | None
) -> None:
    response = response_to(error)
    assert response.status == status
    assert isinstance(response.body, bytes)
    assert json.loads(response.body) == {"error": {"message": "no", "type": kind, "param": param, "code": code}}
    assert response.headers["Content-Type"] == "application/json"
    assert ("Retry-After" in response.headers) == (status == 503)


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidRequest("no", param="model"), 400, "invalid_request_error"),
        (UnknownModel("no", param="model"), 404, "not_found_error"),
        (BodyTimeout("no"), 408, "invalid_request_error"),
        (PayloadTooLarge("no"), 413, "request_too_large"),
        (PodUnreachable("no"), 502, "api_error"),
        (NoPodAvailable("no"), 503, "overloaded_error"),
        (PodTimeout("no"), 504, "timeout_error"),
    ],
)
def test_clients_of_anthropic_s_api_get_its_shape(error: MatrixInferError, status: int, kind: str) -> None:
    response = response_to(error, anthropic=True)
    assert response.status == status
    assert isinstance(response.body, bytes)
    assert json.loads(response.body) == {"type": "error", "error": {"type": kind, "message": "no"}}


def test_an_error_that_clients_cannot_act_on_says_nothing() -> None:
    response = response_to(PluginError("plugin x at /secret/path"))
    assert response.status == 500
    assert isinstance(response.body, bytes)
    assert b"secret" not in response.body
