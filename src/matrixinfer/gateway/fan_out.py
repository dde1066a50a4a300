"""Sends one request to every engine, and answers with what each of them said: adapters are loaded everywhere or nowhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
from aiohttp import web
from multidict import CIMultiDict

from matrixinfer.access.gate import Ticket
from matrixinfer.config import LimitsConfig
from matrixinfer.errors import UNREADABLE, MatrixInferError, NoPodAvailable
from matrixinfer.gateway import headers
from matrixinfer.gateway.credentials import Credentials
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
        limits: LimitsConfig,
        credentials: Credentials,
        *,
        changed: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._registry = registry
        self._upstream = upstream
        self._limits = limits
        self._credentials = credentials
        self._changed = changed

    def reconfigure(self, limits: LimitsConfig) -> None:
        """Keep these limits from now on."""
        self._limits = limits

    async def __call__(
        self, request: web.BaseRequest, body: bytes, identity: str, ticket: Ticket | None
    ) -> web.StreamResponse:
        """Answer with `results`: the status and the body of each pod's answer, by its name. Raises `MatrixInferError`.

        The status is 200 if that is what all of them say, the pods' own if they agree on another one, and otherwise 502.
        """
        caller = None if ticket is None else ticket.caller
        if ticket is not None and caller is not None and caller.models is not None:
            ticket.check_model(decode(_NAMED, body).lora_name)  # an adapter is a model
        return _response(await self._ask_all(request, body, identity, is_authenticated=caller is not None))

    async def _ask_all(
        self, request: web.BaseRequest, body: bytes, identity: str, *, is_authenticated: bool
    ) -> dict[str, tuple[int | None, object]]:
        model = request.rel_url.query.get("model")
        pods = self._registry.pods if model is None else self._registry.resolve(model)[1]
        if not pods:
            raise NoPodAvailable("There is no pod.")
        fields = headers.to_pod(request.headers, identity, None)
        turns = asyncio.Semaphore(MOST_AT_ONCE)

        async def ask(pod: Pod) -> tuple[int | None, object]:
            async with turns:
                sent = fields.copy()
                self._credentials.apply(sent, pod.url, is_authenticated=is_authenticated)
                sent["accept-encoding"] = "identity"
                return await self._ask(pod, request, body, sent)

        answers = await asyncio.gather(*(ask(pod) for pod in pods))
        return {pod.name: answer for pod, answer in zip(pods, answers, strict=True)}

    async def _ask(
        self, pod: Pod, request: web.BaseRequest, body: bytes, sent: CIMultiDict[str]
    ) -> tuple[int | None, object]:
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
