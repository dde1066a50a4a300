"""Keeps web pages out of the admin listener.

A page in an operator's browser can send requests to any address that the browser reaches. It cannot read the answers,
unless a name of its own points to that address (DNS rebinding); so a name in `Host` must be one that is expected. What
it can do without reading answers, to change something, must come from the listener's own pages.
"""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import ip_address
from urllib.parse import urlsplit

from aiohttp import web

from matrixinfer.gateway.errors import error_response
from matrixinfer.gateway.listener import Handler, Routes


def guarded(routes: Routes, names: Collection[str]) -> Routes:
    """`routes`, for requests to an IP address, a name without dots or one of `names`, and not from other sites.

    Names without dots (`localhost`, a service in the same namespace) are resolved locally: no page can own one.
    """
    allowed = frozenset(name.lower() for name in names)
    return {
        path: {method: _guarded(handler, allowed) for method, handler in methods.items()}
        for path, methods in routes.items()
    }


def _guarded(handler: Handler, names: Collection[str]) -> Handler:
    async def guard(request: web.BaseRequest) -> web.StreamResponse:
        host = _host(f"//{request.headers.get('Host', '')}")
        if not (host in names or _is_local(host)):
            return error_response(403, f"`{host[:100]}` is not a name of this listener; add it to `adminNames`.")
        if request.method not in ("GET", "HEAD") and _is_foreign(request):
            return error_response(403, "This request comes from another site.")
        return await handler(request)

    return guard


def _is_foreign(request: web.BaseRequest) -> bool:
    if request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        return True
    origin = request.headers.get("Origin")
    return origin is not None and urlsplit(origin).netloc.lower() != request.headers.get("Host", "").lower()


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_local(host: str) -> bool:
    if host and "." not in host:
        return True
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
