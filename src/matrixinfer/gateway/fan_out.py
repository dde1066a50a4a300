"""Sends one request to every engine, and answers with what each of them said: adapters are loaded everywhere or nowhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
from aiohttp import web
from multidict import CIMultiDict

from matrixinfer.access.callers import Caller
from matrixinfer.config import LimitsConfig
from matrixinfer.errors import UNREADABLE, MatrixInferError, NoPodAvailable
from matrixinfer.gateway import headers
from matrixinfer.gateway.body import Bodies
from matrixinfer.gateway.credentials import Credentials
from matrixinfer.gateway.errors import response_to
from matrixinfer.gateway.protected import caller_of
from matrixinfer.gateway.responses import json_response
from matrixinfer.gateway.upstream import Upstream
from matrixinfer.pods.pod import Pod
from matrixinfer.pods.registry import PodRegistry
from matrixinfer.prompt.fields import decode

MOST_AT_ONCE = 32
_MOST_BYTES = 16 * 1024
"""Of each engine's answer."""


class FanOut:
    """Asks every pod that may serve the model in `?model=…`, or every pod. `changed` is called with those that agreed."""

    def __init__(
        self,
        registry: PodRegistry,
        upstream: Upstream,
        bodies: Bodies,
        limits: LimitsConfig,
        credentials: Credentials,
        *,
        changed: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._registry = registry
        self._upstream = upstream
        self._bodies = bodies
        self._limits = limits
        self._credentials = credentials
        self._changed = changed

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer with `results`: the status and the body of each pod's answer, by its name.

        The status is 200 if that is what all of them say, the pods' own if they agree on another one, and otherwise 502.
        """
        identity = headers.request_id(request.headers)
        try:
            with self._bodies.hold() as held:
                body = await self._bodies.read(request, held)
                _check_adapter(caller_of(request), body)
                results = await self._ask_all(request, body, identity)
        except MatrixInferError as error:
            response = response_to(error)
        else:
            response = _response(results)
        response.headers[headers.REQUEST_ID] = identity
        return response

    async def _ask_all(
        self, request: web.BaseRequest, body: bytes, identity: str
    ) -> dict[str, tuple[int | None, object]]:
        model = request.rel_url.query.get("model")
        pods = self._registry.pods if model is None else self._registry.resolve(model)[1]
        if not pods:
            raise NoPodAvailable("There is no pod.")
        turns = asyncio.Semaphore(MOST_AT_ONCE)

        async def ask(pod: Pod) -> tuple[int | None, object]:
            async with turns:
                return await self._ask(pod, request, body, identity)

        answers = await asyncio.gather(*(ask(pod) for pod in pods))
        return {pod.name: answer for pod, answer in zip(pods, answers, strict=True)}

    async def _ask(self, pod: Pod, request: web.BaseRequest, body: bytes, identity: str) -> tuple[int | None, object]:
        sent = headers.to_pod(request.headers, identity, None)
        self._credentials.apply(sent, pod.url, is_authenticated=caller_of(request) is not None)
        sent["accept-encoding"] = "identity"
        try:
            async with asyncio.timeout(self._limits.request_timeout_seconds):
                return await self._send(pod, request, body, sent)
        except (MatrixInferError, TimeoutError) as error:
            return None, f"the pod did not answer ({str(error) or 'timeout'})"

    async def _send(
        self, pod: Pod, request: web.BaseRequest, body: bytes, sent: CIMultiDict[str]
    ) -> tuple[int | None, object]:
        answer = await self._upstream.send(request.method, pod.url, request.rel_url.raw_path_qs, body, sent)
        try:
            pieces, size = [], 0
            while size < _MOST_BYTES and (piece := await answer.readany()):
                pieces.append(piece)
                size += len(piece)
        finally:
            answer.close()
        if answer.status < 300:
            self._changed(pod.name)
        return answer.status, _readable(b"".join(pieces)[:_MOST_BYTES])


class _Named(msgspec.Struct):
    lora_name: str


_NAMED = msgspec.json.Decoder(_Named)


def _check_adapter(caller: Caller | None, body: bytes) -> None:
    """An adapter is a model. Raises `Forbidden` if the caller may not use it, and `InvalidRequest` without its name."""
    if caller is not None and caller.models is not None:
        caller.check_model(decode(_NAMED, body).lora_name)


def _readable(body: bytes) -> object:
    try:
        return msgspec.json.decode(body)
    except UNREADABLE:
        return body.decode("utf-8", "replace")


def _response(results: dict[str, tuple[int | None, object]]) -> web.Response:
    statuses = {status for status, _ in results.values()}
    agreed = statuses.pop() if len(statuses) == 1 else None
    status = 200 if agreed is not None and agreed < 300 else agreed or 502
    views = {name: {"status": status, "body": body} for name, (status, body) in results.items()}
    failed = sorted(name for name, (status, _) in results.items() if status is None or status >= 300)
    content: dict[str, object] = {"results": views}
    if failed:
        message = f"{len(failed)} of {len(results)} pods did not do it: {', '.join(failed[:10])}. See `results`."
        kind = "invalid_request_error" if status < 500 else "server_error"
        content = {"error": {"message": message, "type": kind, "param": None, "code": None}, **content}
    return json_response(content, status=status)
