"""The simulated engine: one vLLM replica's HTTP API and KV events around an engine model.

Replies are made up, one choice per request; of a list of prompts the first is answered.
"""

from __future__ import annotations

import asyncio
import socket
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

import msgspec
from aiohttp import web

from matrixinfer.blocks import TokenIds
from matrixinfer.errors import InvalidRequest, RequestError, TokenizeError, UnknownModel
from matrixinfer.prompt import openai, requests
from matrixinfer.prompt.base import Chat
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim import api
from matrixinfer.sim.cache import PagedPrefixCache
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.driver import EngineDriver, Ticket
from matrixinfer.sim.events import Event, EventBatch, encode
from matrixinfer.sim.metrics import EngineMetrics
from matrixinfer.sim.model import EngineModel, EngineStats
from matrixinfer.sim.publisher import BUFFER_BATCHES, HIGH_WATER_MARK, EventPublisher
from matrixinfer.sim.reply import ReplyWriter

_VERSION = "0.32.0"
"""The vLLM release whose API and event layout this is."""
_MAX_BODY_BYTES = 64 * 1024 * 1024
_SHUTDOWN_SECONDS = 1.0
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class SimEngine:
    """A replica that serves while its context is open. Several may share a process and a tokenizer."""

    def __init__(self, config: SimEngineConfig, tokenizer: LocalTokenizer) -> None:
        self.config = config
        self._tokenizer = tokenizer
        model = EngineModel(
            PagedPrefixCache(config.num_blocks, config.block_size),
            config.timing,
            max_tokens=config.max_batched_tokens,
            max_sequences=config.max_sequences,
        )
        self._writer = ReplyWriter(tokenizer, config.seed)
        self._driver = EngineDriver(model, self._publish)
        self._metrics = EngineMetrics(config, self._driver)
        self._publisher = EventPublisher(
            config.host, port=config.kv_port, replay_port=config.replay_port, topic=config.topic
        )
        self._stack = AsyncExitStack()
        self._created = 0
        self._port = config.port

    async def __aenter__(self) -> Self:
        """Open the ports and start. Raises `OSError` or `zmq.ZMQError` when a port is taken."""
        self._created = int(time.time())
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._publisher)
            listener = stack.enter_context(socket.create_server((self.config.host, self.config.port)))
            self._port = listener.getsockname()[1]
            group = await stack.enter_async_context(asyncio.TaskGroup())
            for work in (self._driver.run(), self._publisher.serve()):
                stack.callback(group.create_task(work).cancel)
            # A client that goes away must cancel its handler: that is what aborts a request.
            runner = web.AppRunner(
                self._application(), handler_cancellation=True, access_log=None, shutdown_timeout=_SHUTDOWN_SECONDS
            )
            stack.push_async_callback(runner.cleanup)
            await runner.setup()
            await web.SockSite(runner, listener).start()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The task group must not see the caller's error: it would wrap it in an exception group.
        await self._stack.aclose()

    @property
    def url(self) -> str:
        """Base URL of the API, without `/v1`."""
        return f"http://{self.config.host}:{self._port}"

    @property
    def kv_endpoint(self) -> str:
        """PUB endpoint of the KV events."""
        return self._publisher.endpoint

    @property
    def replay_endpoint(self) -> str:
        """ROUTER endpoint of past KV events."""
        return self._publisher.replay_endpoint

    @property
    def stats(self) -> EngineStats:
        """What the engine counts."""
        return self._driver.model.stats

    def _publish(self, events: list[Event]) -> None:
        self._publisher.publish(encode(EventBatch(time.time(), events)))

    def _application(self) -> web.Application:
        app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[_refusals])
        app.add_routes(
            [
                web.post(openai.CHAT_PATH, self._generate),
                web.post(openai.COMPLETIONS_PATH, self._generate),
                web.post("/tokenize", self._tokenize),
                web.post("/reset_prefix_cache", self._reset),
                web.get("/v1/models", self._models),
                web.get("/kv_event_sources", self._event_sources),
                web.get("/metrics", self._expose_metrics),
                web.get("/load", self._load),
                web.get("/health", self._health),
                web.get("/version", self._version),
            ]
        )
        return app

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        came = time.monotonic()
        body = await request.read()
        prompt = requests.parse(request.path, body)
        options = api.decode(body, api.GenerateOptions)
        self._check_model(prompt.model)
        if options.n not in (None, 1):
            raise InvalidRequest("this engine gives one choice per request", param="n")
        ids = prompt.token_ids
        if ids is None:
            ids = self._encode(prompt.chat, prompt.text, add_special_tokens=prompt.add_special_tokens)
        reply = self._writer.write(ids, self._reply_length(len(ids), options.limit))
        exchange = api.Exchange(
            chat=prompt.chat is not None,
            request_id=request.headers.get("x-request-id") or uuid.uuid4().hex,
            created=int(time.time()),
            model=prompt.model,
            prompt_tokens=len(ids),
            reply=reply,
            finish_reason="stop" if options.limit is None else "length",
            include_usage=options.stream_options is not None and options.stream_options.include_usage,
        )
        with self._driver.request(ids, reply.ids, prompt.cache_salt) as ticket:
            if prompt.stream:
                return await self._stream(request, exchange, ticket, came)
            seen = await ticket.wait(0)
            self._metrics.first_token(time.monotonic() - came)
            while seen < len(reply.ids):
                seen = await ticket.wait(seen)
            return _json(exchange.answer(ticket.cached_tokens), headers=exchange.headers)

    async def _stream(
        self, request: web.Request, exchange: api.Exchange, ticket: Ticket, came: float
    ) -> web.StreamResponse:
        headers = {"content-type": "text/event-stream; charset=utf-8", **exchange.headers}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        seen = 0
        while seen < len(exchange.reply.ids):
            generated = await ticket.wait(seen)
            if not seen:
                self._metrics.first_token(time.monotonic() - came)
            await response.write(exchange.chunks(seen, generated, ticket.cached_tokens))
            seen = generated
        await response.write_eof()
        return response

    async def _tokenize(self, request: web.Request) -> web.Response:
        query = api.decode(await request.read(), api.TokenizeRequest)
        if query.model is not None:
            self._check_model(query.model)
        chat = query.chat
        special = query.add_special_tokens
        ids = self._encode(chat, query.prompt, add_special_tokens=chat is None if special is None else special)
        length = self.config.context_length
        return _json({"count": len(ids), "max_model_len": length, "tokens": ids.tolist(), "token_strs": None})

    async def _reset(self, _: web.Request) -> web.Response:
        return _json({"success": self._driver.model.reset_prefix_cache()})

    async def _models(self, _: web.Request) -> web.Response:
        config = self.config
        return _json(api.models(config.names, config.model, config.context_length, self._created))

    async def _event_sources(self, _: web.Request) -> web.Response:
        publish, replay = (f"tcp://*:{end.rpartition(':')[2]}" for end in (self.kv_endpoint, self.replay_endpoint))
        source = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": publish,
            "replay_endpoint": replay,
            "buffer_steps": BUFFER_BATCHES,
            "hwm": HIGH_WATER_MARK,
            "max_queue_size": HIGH_WATER_MARK,
            "topic": self.config.topic,
        }
        return _json({"0": source})

    async def _expose_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.render(), headers={"content-type": "text/plain; version=0.0.4"})

    async def _load(self, _: web.Request) -> web.Response:
        return _json({"server_load": self._driver.in_flight})

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _version(self, _: web.Request) -> web.Response:
        return _json({"version": _VERSION})

    def _check_model(self, name: str) -> None:
        if name not in self.config.names:
            raise UnknownModel(f"The model `{name}` does not exist.", param="model")

    def _encode(self, chat: Chat | None, text: str | None, *, add_special_tokens: bool) -> TokenIds:
        if chat is not None:
            text = self._tokenizer.render(chat)
        if text is None:
            raise InvalidRequest("expected `prompt` or `messages`")
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _reply_length(self, prompt_tokens: int, limit: int | None) -> int:
        if limit is not None and limit < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, got {limit}.", param="max_tokens")
        if not prompt_tokens:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        room = self.config.context_length - prompt_tokens
        if room < (limit or 1):
            raise InvalidRequest(
                f"This model's maximum context length is {self.config.context_length} tokens, but {prompt_tokens} "
                f"tokens of prompt and {limit or 1} of reply were requested.",
                param="input_tokens",
            )
        return min(self.config.default_max_tokens, room) if limit is None else limit


@web.middleware
async def _refusals(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except RequestError as failure:
        status, body = api.error(failure)
    except TokenizeError as failure:
        status, body = api.error(InvalidRequest(str(failure)))
    return _json(body, status=status)


def _json(data: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(data), status=status, headers={"content-type": "application/json", **(headers or {})}
    )
