"""Lets web pages of other origins use the API, as far as the configuration says (CORS, Fetch 3.2)."""

from __future__ import annotations

from collections.abc import Collection

from aiohttp import web
from multidict import CIMultiDict

from matrixinfer.config import CorsConfig

ORIGIN, METHOD, HEADERS = "Origin", "Access-Control-Request-Method", "Access-Control-Request-Headers"
_ALLOW = "Access-Control-Allow-"
_PREFIX = "access-control-"


class Cors:
    """Answers preflight requests, and adds to every other answer whether a page may read it."""

    def __init__(self, config: CorsConfig) -> None:
        self._config = config
        self._origins = frozenset(config.origins)
        self._for_all = "*" in config.origins
        self._any_header = "*" in config.headers

    def preflight(self, request: web.BaseRequest, methods: Collection[str]) -> web.Response | None:
        """The answer to a preflight request for a path with these methods; None for any other request."""
        if request.method != "OPTIONS" or METHOD not in request.headers or ORIGIN not in request.headers:
            return None
        response = web.Response(status=204)
        response.headers["Vary"] = f"{METHOD}, {HEADERS}"
        if self._allowed(request.headers[ORIGIN]) is None:
            return response  # without the headers that allow it, browsers refuse
        response.headers[f"{_ALLOW}Methods"] = ", ".join(methods)
        asked = request.headers.get(HEADERS, "")
        allowed = asked if self._any_header else ", ".join(self._config.headers)
        if allowed:
            response.headers[f"{_ALLOW}Headers"] = allowed
        response.headers["Access-Control-Max-Age"] = str(self._config.max_age_seconds)
        return response

    def decorate(self, request: web.BaseRequest, headers: CIMultiDict[str], *, is_preflight: bool) -> None:
        """Add to the headers of an answer. What an engine says about origins is not said about this gateway."""
        for name in [name for name in headers if name.lower().startswith(_PREFIX) and not is_preflight]:
            headers.popall(name, None)
        if not self._for_all:
            headers["Vary"] = ", ".join([*headers.popall("Vary", ()), ORIGIN])
        origin = request.headers.get(ORIGIN)
        allowed = None if origin is None else self._allowed(origin)
        if allowed is None:
            return
        headers[f"{_ALLOW}Origin"] = allowed
        if self._config.credentials:
            headers[f"{_ALLOW}Credentials"] = "true"
        if self._config.expose_headers and not is_preflight:
            headers["Access-Control-Expose-Headers"] = ", ".join(self._config.expose_headers)

    def _allowed(self, origin: str) -> str | None:
        """The origin that an answer names; None if this one is not allowed."""
        if self._for_all:
            return "*"
        return origin if origin in self._origins else None
