"""The OpenAPI document of the listener: which paths there are, what they take, and how errors look.

Engines validate most fields, so the schemas name only what the gateway itself reads, and allow everything else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import msgspec
from aiohttp import web

from matrixinfer import __version__
from matrixinfer.gateway.listener import Routes
from matrixinfer.gateway.models import PATH as MODELS_PATH
from matrixinfer.prompt.anthropic import COUNT_PATH, MESSAGES_PATH
from matrixinfer.prompt.openai import CHAT_PATH, COMPLETIONS_PATH
from matrixinfer.prompt.requests import READERS
from matrixinfer.prompt.responses import RESPONSES_PATH

PATH = "/openapi.json"
Json: TypeAlias = dict[str, Any]

_TEXT: Json = {"type": "string"}
_MESSAGES: Json = {"type": "array", "minItems": 1, "items": {"type": "object"}}
_PROMPT: Json = {"oneOf": [_TEXT, {"type": "array", "minItems": 1}]}
_SHARED: Json = {
    "model": {"type": "string", "description": "May be left out where one model is served."},
    "stream": {"type": ["boolean", "null"]},
    "cache_salt": {"type": ["string", "null"]},
    "user": {"type": ["string", "null"]},
}
_FIELDS: Mapping[str, tuple[Json, tuple[str, ...]]] = {
    CHAT_PATH: ({"messages": _MESSAGES}, ("messages",)),
    COMPLETIONS_PATH: ({"prompt": _PROMPT}, ("prompt",)),
    RESPONSES_PATH: ({"input": _PROMPT, "previous_response_id": {"type": ["string", "null"]}}, ("input",)),
    MESSAGES_PATH: ({"messages": _MESSAGES, "max_tokens": {"type": "integer"}}, ("messages", "max_tokens")),
    COUNT_PATH: ({"messages": _MESSAGES}, ("messages",)),
    "/v1/embeddings": ({"input": _PROMPT}, ()),
    **dict.fromkeys(("/score", "/v1/score"), ({"queries": _PROMPT, "documents": _PROMPT}, ())),
    **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), ({"query": {}, "documents": {}}, ("query", "documents"))),
}
_STATUSES = {
    "400": "The request is malformed.",
    "401": "No valid API key or token, where they are needed.",
    "403": "The key may not use the model.",
    "404": "Unknown path, model or response.",
    "405": "Wrong method for the path.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "The body is compressed.",
    "429": "The engine, or the gateway, is too busy for this client.",
    "502": "No pod answered.",
    "503": "No pod serves the model now, or there is no room for another request.",
    "504": "A pod did not answer in time.",
}


class OpenApi:
    """Serves the document of `routes`."""

    def __init__(self, routes: Routes) -> None:
        self._document = msgspec.json.encode(document({path: tuple(methods) for path, methods in routes.items()}))

    def routes(self) -> Routes:
        """Its path."""
        return {PATH: {"GET": self.show}}

    async def show(self, _: web.BaseRequest) -> web.StreamResponse:
        """The document."""
        return web.Response(body=self._document, content_type="application/json")


def document(paths: Mapping[str, tuple[str, ...]]) -> Json:
    """The document for these paths and their methods."""
    described = {**paths, PATH: ("GET",)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "MatrixInfer Gateway",
            "version": __version__,
            "description": "The APIs of the engines behind it. Answers are the engines' own.",
        },
        "paths": {_template(path): _path(path, methods) for path, methods in sorted(described.items())},
        "components": {"schemas": {"Error": _openai_error(), "AnthropicError": _anthropic_error()}},
    }


def _template(path: str) -> str:
    return f"{path}{{rest}}" if path.endswith("/") else path


def _path(path: str, methods: tuple[str, ...]) -> Json:
    item: Json = {method.lower(): _operation(path, method) for method in methods}
    if path.endswith("/"):
        item["parameters"] = [{"name": "rest", "in": "path", "required": True, "schema": _TEXT}]
    return item


def _operation(path: str, method: str) -> Json:
    name = re.sub(r"\W+", "_", f"{method.lower()}{_template(path)}").strip("_")
    operation: Json = {"operationId": name, "responses": _responses(path)}
    if path in READERS:
        fields, required = _FIELDS[path]
        schema = {"type": "object", "properties": {**_SHARED, **fields}, "required": list(required)}
        operation["summary"] = "Goes to the pod that holds most of the prompt."
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    elif method not in ("GET", "DELETE"):
        operation["summary"] = "Passed on to an engine as it is."
        media = ("application/json", "multipart/form-data", "*/*")
        operation["requestBody"] = {"content": {kind: {"schema": {}} for kind in media}}
    return operation


def _responses(path: str) -> Json:
    answered: Json = {"description": "The answer.", "content": {"application/json": {}}}
    if path in READERS:
        answered["content"]["text/event-stream"] = {}
    if path in ("/health", "/ready", "/metrics", PATH) or path.startswith(MODELS_PATH):
        return {"200": answered, "default": {"description": "An error.", "content": {"application/json": {}}}}
    name = "AnthropicError" if path.startswith(MESSAGES_PATH) else "Error"
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    errors = {status: {"description": words, "content": content} for status, words in _STATUSES.items()}
    return {"200": answered, **errors, "default": {"description": "An answer of the engine."}}


def _openai_error() -> Json:
    fields = {"message": _TEXT, "type": _TEXT, "param": {"type": ["string", "null"]}, "code": {}}
    error = {"type": "object", "required": ["message", "type"], "properties": fields}
    return {"type": "object", "required": ["error"], "properties": {"error": error}}


def _anthropic_error() -> Json:
    error = {"type": "object", "required": ["message", "type"], "properties": {"message": _TEXT, "type": _TEXT}}
    return {"type": "object", "required": ["type", "error"], "properties": {"type": {"const": "error"}, "error": error}}
