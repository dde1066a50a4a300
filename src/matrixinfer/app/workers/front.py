"""One admin listener over all workers: what it reads is merged, and what it changes is changed at each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias
from urllib.parse import quote

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from matrixinfer.app.workers.process import Answer, WorkerProcess
from matrixinfer.dashboard.pages import HEADERS, file_routes
from matrixinfer.dashboard.stream import Stream
from matrixinfer.errors import InvalidRequest
from matrixinfer.gateway.body import Bodies
from matrixinfer.gateway.errors import error_response
from matrixinfer.gateway.listener import Handler, Routes
from matrixinfer.gateway.responses import json_response
from matrixinfer.telemetry.merged import Families, merged, parsed, rendered

_Fields: TypeAlias = dict[str, msgspec.Raw]


class AdminFront:
    """Answers from the workers. `own_metrics` are those of the supervisor itself."""

    def __init__(
        self,
        workers: Sequence[WorkerProcess],
        draining: asyncio.Event,
        bodies: Bodies,
        own_metrics: Callable[[], bytes],
        reload: Callable[[], Awaitable[web.StreamResponse]],
    ) -> None:
        self.added: dict[str, bytes] = {}
        """Pods that operators have added, by name, for workers that start later."""
        self.drained: set[str] = set()
        self._workers = workers
        self._draining = draining
        self._bodies = bodies
        self._own_metrics = own_metrics
        self._reload = reload
        self._pages = Stream(self._dashboard, draining, HEADERS)

    def status_routes(self) -> Routes:
        """Liveness, readiness and metrics."""
        return {
            "/health": {"GET": self.health},
            "/ready": {"GET": self.ready},
            "/metrics": {"GET": self.metrics},
        }

    def routes(self) -> Routes:
        """Paths of the admin listener."""
        one: dict[str, Handler] = {"GET": self.ask_one, "POST": self.ask_one}
        every: dict[str, Handler] = dict.fromkeys(("POST", "DELETE", "PUT", "PATCH"), self.ask_all)
        return {
            **self.status_routes(),
            "/debug/decisions": {"GET": self.decisions},
            **file_routes(),
            "/debug/dashboard/events": {"GET": self._pages.serve},
            "/debug/": one,
            "/admin/reload": {"POST": self.reload},
            "/admin/pods": {"GET": self.pods, **every},
            "/admin/": {"GET": self.ask_one, **every},
        }

    async def health(self, _: web.BaseRequest) -> web.StreamResponse:
        """The supervisor is alive."""
        return json_response({"status": "ok", "workers": sum(each.is_ready.is_set() for each in self._workers)})

    async def ready(self, _: web.BaseRequest) -> web.StreamResponse:
        """At least one worker is ready, and the gateway is not draining."""
        if self._draining.is_set():
            return json_response({"status": "draining"}, status=503)
        answers = await self._all("GET", "/ready")
        best = min(answers, key=lambda each: each.status, default=None)
        return json_response({"status": "no worker"}, status=503) if best is None else _passed_on(best)

    async def metrics(self, _: web.BaseRequest) -> web.StreamResponse:
        """The metrics of all workers, merged."""
        found = await asyncio.gather(*(each.metrics() for each in self._workers))
        present: list[Families] = [each for each in found if each is not None]
        gone: dict[Any, float] = {}
        for worker in self._workers:
            for key, value in worker.gone.items():
                gone[key] = gone.get(key, 0.0) + value
        families = {**merged(present, gone), **parsed(self._own_metrics().decode())}
        return web.Response(body=rendered(families), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def decisions(self, request: web.BaseRequest) -> web.StreamResponse:
        """The last decisions of all workers, newest first."""
        answers = await self._all("GET", request.rel_url.raw_path_qs)
        bad = next((each for each in answers if each.status != 200), None)
        if bad is not None or not answers:
            return _passed_on(bad or _nobody())
        found = [each for answer in answers for each in msgspec.json.decode(answer.body)["decisions"]]
        found.sort(key=lambda each: float(each.get("at", 0.0)), reverse=True)
        limit = request.rel_url.query.get("limit", "100")
        return json_response({"decisions": found[: int(limit)]})

    async def pods(self, request: web.BaseRequest) -> web.StreamResponse:
        """Every pod, with what all workers have in flight there."""
        answers = [each for each in await self._all("GET", request.rel_url.raw_path_qs) if each.status == 200]
        if not answers:
            return _passed_on(_nobody())
        lists = [msgspec.json.decode(each.body) for each in answers]
        for pod in lists[0]["pods"]:
            same = [each for one in lists for each in one["pods"] if each["name"] == pod["name"]]
            if "in_flight" in pod:
                pod["in_flight"] = sum(each.get("in_flight", 0) for each in same)
            if any(each["state"] == "draining" for each in same):
                pod["state"] = "draining"
        return json_response(lists[0])

    async def reload(self, _: web.BaseRequest) -> web.StreamResponse:
        """Read the configuration again."""
        return await self._reload()

    async def ask_one(self, request: web.BaseRequest) -> web.StreamResponse:
        """The answer of one worker, which says whose it is: of `?worker=`, or of the first that is there."""
        among = self._asked_for(request.rel_url.query.get("worker"))
        with self._bodies.hold() as held:
            body = await self._bodies.read(request, held, is_text=False)
            worker, answer = await self._first(among, request.method, request.rel_url.raw_path_qs, body)
        if worker is None and len(among) == 1:
            return error_response(503, f"Worker {among[0].number} is not running now.")
        if worker is None or answer.status != 200:
            return _passed_on(answer)
        return _passed_on(answer._replace(body=self._signed(answer.body, worker)))

    async def _dashboard(self, _: int) -> tuple[int, bytes]:
        """What one worker shows on the dashboard: all of it, as the next answer may be another worker's."""
        worker, answer = await self._first(self._workers, "GET", "/debug/dashboard")
        if worker is None or answer.status != 200:
            raise ConnectionResetError("no worker is running now")  # the page connects again
        parts = msgspec.json.decode(answer.body, type=_Fields)
        parts["about"] = msgspec.Raw(self._signed(bytes(parts["about"]), worker))
        return 0, msgspec.json.encode(parts)

    def _asked_for(self, number: str | None) -> Sequence[WorkerProcess]:
        """The workers that may answer. Raises `InvalidRequest`."""
        if number is None:
            return self._workers
        found = [each for each in self._workers if str(each.number) == number]
        if not found:
            message = f"worker: expected a number from 1 to {len(self._workers)}, got `{number[:20]}`"
            raise InvalidRequest(message, param="worker")
        return found

    def _signed(self, body: bytes, worker: WorkerProcess) -> bytes:
        """A JSON object that says which worker it is from, and how many there are."""
        fields = msgspec.json.decode(body, type=_Fields)
        own = {"worker": worker.number, "workers": len(self._workers)}
        return msgspec.json.encode({**fields, **own})

    async def ask_all(self, request: web.BaseRequest) -> web.StreamResponse:
        """Change something at every worker. The answer is the worst of theirs."""
        with self._bodies.hold() as held:
            body = await self._bodies.read(request, held, is_text=False)
            answers = await self._all(request.method, request.rel_url.raw_path_qs, body)
        worst = max(answers, key=lambda each: each.status, default=None)
        if worst is None:
            return _passed_on(_nobody())
        if worst.status < 300:
            self._remember(request, body, worst)
        return _passed_on(worst)

    async def catch_up(self, worker: WorkerProcess) -> None:
        """Let a new worker know what operators have changed."""
        for body in tuple(self.added.values()):
            await worker.ask("POST", "/admin/pods", body)
        for path in tuple(self.drained):
            await worker.ask("POST", path)

    async def _first(
        self, workers: Sequence[WorkerProcess], method: str, path: str, body: bytes = b""
    ) -> tuple[WorkerProcess | None, Answer]:
        for worker in workers:
            answer = await worker.ask(method, path, body)
            if answer is not None:
                return worker, answer
        return None, _nobody()

    async def _all(self, method: str, path: str, body: bytes = b"") -> list[Answer]:
        answers = await asyncio.gather(*(each.ask(method, path, body) for each in self._workers))
        return [each for each in answers if each is not None]

    def _remember(self, request: web.BaseRequest, body: bytes, answer: Answer) -> None:
        """Keep what has changed, by the name that the workers gave to the pod: there are several ways to write it."""
        path, method = request.rel_url.raw_path, request.method
        if not f"{path}/".startswith("/admin/pods/"):
            return
        name = str(msgspec.json.decode(answer.body)["name"])
        drain = f"/admin/pods/{quote(name, safe='')}/drain"
        action = path.removeprefix("/admin/pods/").partition("/")[2]
        if path == "/admin/pods":
            self.added[name] = body
        elif not action:
            self.added.pop(name, None)
            self.drained.discard(drain)
        elif method == "POST":
            self.drained.add(drain)
        else:
            self.drained.discard(drain)


def _passed_on(answer: Answer) -> web.Response:
    return web.Response(status=answer.status, body=answer.body, headers={"Content-Type": answer.content_type})


def _nobody() -> Answer:
    response = error_response(503, "No worker is running now.")
    return Answer(503, response.body if isinstance(response.body, bytes) else b"", "application/json")
