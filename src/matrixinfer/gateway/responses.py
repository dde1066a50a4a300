"""Responses that are not errors."""

from __future__ import annotations

import msgspec
from aiohttp import web


def json_response(data: object, *, status: int = 200) -> web.Response:
    """`data` as JSON."""
    return web.Response(status=status, body=msgspec.json.encode(data), headers={"Content-Type": "application/json"})
