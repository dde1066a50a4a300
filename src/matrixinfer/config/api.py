"""The schema of `api`: which paths of the engines clients may use, and how the front answers them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated

from msgspec import Meta

from matrixinfer.config.base import Seconds, Section, described
from matrixinfer.errors import ConfigError

_GET, _POST = ("GET",), ("POST",)

ENGINE_PATHS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "/v1/responses/": ("GET", "POST", "DELETE"),
        "/tokenize": _POST,
        "/v1/tokenize": _POST,
        "/detokenize": _POST,
        "/v1/detokenize": _POST,
        "/tokenizer_info": _GET,
        "/pooling": _POST,
        "/classify": _POST,
        "/v1/classify": _POST,
        "/v2/embed": _POST,
        "/generative_scoring": _POST,
        "/v1/audio/transcriptions": _POST,
        "/v1/audio/translations": _POST,
        "/v1/audio/speech": _POST,
        "/v1/chat/completions/batch": _POST,
        "/v1/chat/completions/render": _POST,
        "/v1/completions/render": _POST,
        "/v1/messages/render": _POST,
        "/v1/responses/render": _POST,
        "/v1/chat/completions/derender": _POST,
        "/v1/completions/derender": _POST,
        "/inference/v1/generate": _POST,
        "/generate": _POST,
        "/v1/load_lora_adapter": _POST,
        "/v1/unload_lora_adapter": _POST,
        "/load_lora_adapter": _POST,
        "/unload_lora_adapter": _POST,
    }
)
"""Paths of vLLM and SGLang that bring no prompt to route by, with their methods."""
OTHER_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
"""Methods of paths that are not known here."""


class CorsConfig(Section, frozen=True):
    """Which web pages of other origins may use the API (CORS)."""

    origins: Annotated[
        tuple[str, ...],
        described("Origins that may, such as `https://chat.example.com`; `*` stands for all."),
    ]
    headers: Annotated[
        tuple[str, ...],
        described("Headers that their requests may carry; `*` stands for all, `Authorization` included."),
    ] = ("*",)
    expose_headers: Annotated[
        tuple[str, ...], described("Headers of answers that they may read, beside those that every page may.")
    ] = ("x-request-id", "x-matrixinfer-pod", "retry-after")
    credentials: Annotated[
        bool,
        described(
            "Whether browsers may send cookies and the like. `Authorization` set by a script needs no such leave."
        ),
    ] = False
    max_age_seconds: Annotated[
        Annotated[int, Meta(ge=0)], described("How long browsers may remember the answer to a preflight request.")
    ] = 600


class ApiConfig(Section, frozen=True):
    """Which paths of the engines clients may use beside the APIs that take a prompt, and how the front answers them."""

    paths: Annotated[
        tuple[str, ...],
        described(
            "Paths that are passed to an engine although they bring no prompt to route by: an allow-list. A path that ends "
            "with a slash stands for all below it. A list of your own replaces this one."
        ),
    ] = tuple(ENGINE_PATHS)
    sse_keep_alive_seconds: Annotated[
        Seconds | None,
        described(
            "After how much silence of an engine a stream of events gets a comment, so that nothing on the way gives it up. "
            "Once the first one is sent, no other pod can be tried. `null` sends none."
        ),
    ] = None
    cors: Annotated[
        CorsConfig | None,
        described("Which web pages of other origins may use the API. `null` says nothing to browsers."),
    ] = None


OWN_PATHS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/embeddings",
        "/score",
        "/v1/score",
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
        "/v1/models",
        "/v1/models/",
        "/health",
        "/ready",
        "/metrics",
        "/openapi.json",
    }
)
"""Paths that the gateway serves itself; those of prompts are always there."""


def check_api(api: ApiConfig) -> None:
    """Check what types cannot express. Raises `ConfigError`."""
    for i, path in enumerate(api.paths):
        where = f"$.api.paths[{i}]"
        if not re.fullmatch(r"(?:/[A-Za-z0-9._~!$&'()*+,;=:@-]+)+/?", path) or {".", ".."} & set(path.split("/")):
            raise ConfigError(where, f"expected a path such as `/tokenize`, got `{path}`")
        if path in OWN_PATHS:
            raise ConfigError(where, f"the gateway serves `{path}` itself; remove it from the list")
        if path in api.paths[:i]:
            raise ConfigError(where, f"`{path}` is listed twice")
    cors = api.cors
    if cors is None:
        return
    for i, origin in enumerate(cors.origins):
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s*]+", origin):
            raise ConfigError(
                f"$.api.cors.origins[{i}]", f"expected an origin such as `https://chat.example.com`, got `{origin}`"
            )
    if cors.credentials and "*" in cors.origins:
        raise ConfigError("$.api.cors.credentials", "expected `false` with the origin `*`: name the origins instead")
    for key, names in (("headers", cors.headers), ("exposeHeaders", cors.expose_headers)):
        for i, name in enumerate(names):
            if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
                raise ConfigError(f"$.api.cors.{key}[{i}]", f"expected the name of a header, got `{name}`")
