"""The dashboard's paths on the admin listener: its files, which load nothing from elsewhere, and its data."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec
from aiohttp import web

from matrixinfer.dashboard.examination import Examination, ExaminationFailed
from matrixinfer.dashboard.live import Live
from matrixinfer.dashboard.stream import Stream
from matrixinfer.errors import InvalidRequest
from matrixinfer.gateway.errors import error_response
from matrixinfer.gateway.listener import Handler, Routes

STATIC = Path(__file__).parent / "static"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Content-Security-Policy": (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
    }
)


class Dashboard:
    """One page and what it asks for."""

    def __init__(self, live: Live, examination: Examination, draining: asyncio.Event) -> None:
        self._live = live
        self._examination = examination
        self._encoder = msgspec.json.Encoder()
        self.stream = Stream(self._view, draining, HEADERS)

    def routes(self) -> Routes:
        """Paths of the admin listener."""
        return {
            **file_routes(),
            "/debug/dashboard": {"GET": self.snapshot},
            "/debug/dashboard/events": {"GET": self.stream.serve},
            "/debug/doctor": {"POST": self.examine},
        }

    async def snapshot(self, request: web.BaseRequest) -> web.StreamResponse:
        """Everything that the page shows, as JSON; with `?since=` a version, what has changed after it."""
        since = request.rel_url.query.get("since", "0")
        if not re.fullmatch(r"[0-9]{1,9}", since):
            raise InvalidRequest(f"since: expected a version, got `{since[:20]}`", param="since")
        return _json(self._live.view(int(since)))

    async def _view(self, since: int) -> tuple[int, bytes]:
        view = self._live.view(since)
        return view.version, self._encoder.encode(view)

    async def examine(self, _: web.BaseRequest) -> web.StreamResponse:
        """What `matrixinfer doctor` finds now."""
        try:
            return _json(await self._examination.run())
        except ExaminationFailed as error:
            return error_response(409, str(error))


def file_routes() -> Routes:
    """The page and its files."""
    files = {
        f"/dashboard/{path.name}": {"GET": _file(path)}
        for path in sorted(STATIC.iterdir())
        if path.suffix in _TYPES and path.name != "index.html"
    }
    return {"/": {"GET": _redirected}, "/dashboard": {"GET": _file(STATIC / "index.html")}, **files}


def _json(data: object) -> web.Response:
    headers = {**HEADERS, "Content-Type": "application/json", "Cache-Control": "no-store"}
    return web.Response(body=msgspec.json.encode(data), headers=headers)


async def _redirected(_: web.BaseRequest) -> web.StreamResponse:
    return web.Response(status=302, headers={"Location": "dashboard"})


def _file(path: Path) -> Handler:
    """Serves a file as it was when this was made."""
    body = path.read_bytes()
    tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
    headers = {**HEADERS, "Content-Type": _TYPES[path.suffix], "Cache-Control": "no-cache", "ETag": tag}

    async def serve(request: web.BaseRequest) -> web.StreamResponse:
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers={"ETag": tag, "Cache-Control": "no-cache"})
        return web.Response(body=body, headers=headers)

    return serve
