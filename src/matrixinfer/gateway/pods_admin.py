"""`/admin/pods`: operators list pods, add and remove them, and drain them."""

from __future__ import annotations

import math
import re
from urllib.parse import unquote

import msgspec
from aiohttp import web

from matrixinfer.config import PodConfig, checked_pods, convert
from matrixinfer.errors import UNREADABLE, ConfigError, InvalidRequest
from matrixinfer.gateway.body import Bodies
from matrixinfer.gateway.errors import error_response
from matrixinfer.gateway.listener import Routes
from matrixinfer.gateway.responses import json_response
from matrixinfer.pods.discovery.fleet import Fleet, NotHere

PATH = "/admin/pods"
_MAX_BODY_BYTES = 64 * 1024


class PodsAdmin:
    """Changes the pods at run time. What is changed here is not written anywhere: it ends with the process."""

    def __init__(self, fleet: Fleet, bodies: Bodies, *, drain_seconds: float) -> None:
        self.drain_seconds = drain_seconds
        self._bodies = bodies
        self._fleet = fleet

    def routes(self) -> Routes:
        """Paths of the admin listener."""
        below = {"GET": self.show, "DELETE": self.delete, "POST": self.post}
        return {PATH: {"GET": self.list, "POST": self.add}, f"{PATH}/": below}

    async def list(self, _: web.BaseRequest) -> web.StreamResponse:
        """Every pod and every source."""
        return json_response({"pods": self._fleet.views(), "sources": self._fleet.source_views()})

    async def add(self, request: web.BaseRequest) -> web.StreamResponse:
        """Add the pod in the body, in the form of `pods[]`, or change it."""
        try:
            (pod,) = checked_pods([convert(await self._body(request), PodConfig, path="$")])
            _refuse_files(pod)
            result = self._fleet.add(pod)
        except ConfigError as error:
            return error_response(400, str(error).replace("$.pods[0]", "$"), param=error.path.removeprefix("$."))
        except NotHere as error:
            return error_response(409, f"{str(error)[:1].upper()}{str(error)[1:]}.")
        return json_response({"name": pod.name, "result": result}, status=201 if result == "added" else 200)

    async def show(self, request: web.BaseRequest) -> web.StreamResponse:
        """One pod."""
        name, action = _name(request)
        view = next((each for each in self._fleet.views() if each["name"] == name), None)
        return _unknown(name) if view is None or action else json_response(view)

    async def delete(self, request: web.BaseRequest) -> web.StreamResponse:
        """Remove a pod that was added here, or end a drain."""
        name, action = _name(request)
        if action == "drain":
            return json_response({"name": name, "result": "present"}) if self._fleet.undrain(name) else _unknown(name)
        if action:
            return _unknown(name)
        try:
            removed = self._fleet.remove(name)
        except NotHere as error:
            return error_response(409, f"{str(error)[:1].upper()}{str(error)[1:]}.")
        return json_response({"name": name, "result": "removed" if removed else "absent"})

    async def post(self, request: web.BaseRequest) -> web.StreamResponse:
        """Drain a pod: `POST /admin/pods/NAME/drain?seconds=`."""
        name, action = _name(request)
        if action != "drain":
            return error_response(405, f"Use POST with {PATH} and {PATH}/NAME/drain.", headers={"Allow": "GET, DELETE"})
        seconds = _seconds(request.rel_url.query.get("seconds"), self.drain_seconds)
        if not self._fleet.drain(name, seconds):
            return _unknown(name)
        return json_response({"name": name, "result": "draining", "seconds": seconds}, status=202)

    async def _body(self, request: web.BaseRequest) -> object:
        if (request.content_length or 0) > _MAX_BODY_BYTES:
            raise ConfigError("$", f"expected at most {_MAX_BODY_BYTES} bytes")
        with self._bodies.hold() as held:
            body = await self._bodies.read(request, held, is_text=False)
        if len(body) > _MAX_BODY_BYTES:
            raise ConfigError("$", f"expected at most {_MAX_BODY_BYTES} bytes")
        try:
            return msgspec.json.decode(body)
        except UNREADABLE as error:
            raise ConfigError("$", f'expected a pod as JSON, such as {{"name": …, "url": …}}: {error}') from error


def _refuse_files(pod: PodConfig) -> None:
    """Whoever reaches the admin listener must not have files and variables of this machine sent to any address."""
    if pod.api_key_file is not None or pod.api_key_env is not None:
        raise ConfigError("$", "expected no key: name it in the config file, at the pod's model or in `engineKeys`")
    tls = pod.tls
    if tls is not None and (tls.ca_file, tls.cert_file, tls.key_file) != (None, None, None):
        raise ConfigError("$.tls", "expected no files: name them in the config file, in `engineTls`")


def _name(request: web.BaseRequest) -> tuple[str, str]:
    """The pod's name in the path, and what follows it."""
    name, _, action = request.rel_url.raw_path.removeprefix(f"{PATH}/").partition("/")
    return unquote(name), action


def _seconds(given: str | None, default: float) -> float:
    if given is None:
        return default
    if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,6})?", given) or not math.isfinite(float(given)):
        raise InvalidRequest(f"seconds: expected a number, got `{given[:20]}`", param="seconds")
    return float(given)


def _unknown(name: str) -> web.Response:
    return error_response(404, f"There is no pod `{name[:200]}`.")
