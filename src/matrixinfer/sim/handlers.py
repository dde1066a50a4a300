"""The simulated engine's HTTP API, with vLLM's paths. `sglang_handlers` has SGLang's.

Replies are made up. Only the first of a list of prompts is answered.
"""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from itertools import count
from typing import Any, NamedTuple

import msgspec
from aiohttp import web

from matrixinfer.blocks import TokenIds
from matrixinfer.errors import InvalidRequest, RequestError, TokenizeError, UnknownModel
from matrixinfer.prompt import openai, requests
from matrixinfer.prompt.base import Chat, Prompt
from matrixinfer.prompt.bounds import Bounds
from matrixinfer.prompt.conversation import has_media
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim import api
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.driver import Ticket
from matrixinfer.sim.media import MediaReader, MediumRun
from matrixinfer.sim.metrics import EngineMetrics, Metrics
from matrixinfer.sim.model import EngineRequest
from matrixinfer.sim.prefix_cache import Adapter
from matrixinfer.sim.rank import Balancer, EngineRank
from matrixinfer.sim.reply import Reply, ReplyWriter

_VERSION = "0.32.0"
"""The vLLM release whose API and event layout the engine has."""
_LOOKAHEAD_VERSION = "0.33.0"
"""The first that has lookahead tokens."""
_MOST_CHOICES = 128
_MAX_BODY_BYTES = 64 * 1024 * 1024
_BOUNDS = Bounds(max_bytes=_MAX_BODY_BYTES, max_items=_MAX_BODY_BYTES)
RANK_HEADER = "X-data-parallel-rank"
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class EnginePrompt(NamedTuple):
    """A prompt as the engine computes it."""

    ids: TokenIds
    media: Sequence[MediumRun] = ()


class EngineHandlers:
    """Answers requests by running them on the ranks."""

    def __init__(self, config: SimEngineConfig, tokenizer: LocalTokenizer, ranks: Sequence[EngineRank]) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._ranks = tuple(ranks)
        self._balancer = Balancer(self._ranks)
        self._writer = ReplyWriter(tokenizer, config.seed)
        self._metrics = self.metrics(config)
        self._created = int(time.time())
        self._ids = count()
        self._media: MediaReader | None = None
        if config.media_token is not None:
            self._media = MediaReader(tokenizer.encode(config.media_token, add_special_tokens=False))

    def application(self) -> web.Application:
        """The application with all paths."""
        app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[self._guard, self._refusals])
        app.add_routes(self.routes())
        return app

    def metrics(self, config: SimEngineConfig) -> Metrics:
        """The metrics that it exposes."""
        return EngineMetrics(config, self._ranks)

    def routes(self) -> list[web.RouteDef]:
        """All paths."""
        return [
            *self.common_routes(),
            web.post("/reset_prefix_cache", self._reset),
            web.get("/kv_event_sources", self._event_sources),
            web.get("/load", self._load),
            web.get("/version", self._version),
        ]

    def common_routes(self) -> list[web.RouteDef]:
        """The paths that vLLM and SGLang share."""
        return [
            web.post(openai.CHAT_PATH, self._generate),
            web.post(openai.COMPLETIONS_PATH, self._generate),
            web.post("/tokenize", self._tokenize),
            web.get("/v1/models", self._models),
            web.get("/metrics", self._expose_metrics),
            web.get("/health", self._health),
        ]

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        received_at = time.monotonic()
        body = await request.read()
        options = api.decode(body, api.GenerateOptions)
        prompt = self.parse(request.path, body, options)
        choices = 1 if options.n is None else options.n
        if not 1 <= choices <= _MOST_CHOICES:
            raise InvalidRequest(f"n must be from 1 to {_MOST_CHOICES}, got {choices}.", param="n")
        adapter, extra_key = self.namespace(prompt, body)
        ids, media = self.read(prompt, body)
        length = self._reply_length(len(ids), options.limit)
        replies = tuple(self._writer.write(ids, length, choice) for choice in range(choices))
        rank = self.rank(request, body)
        exchange = self.exchange(
            request.path,
            body,
            chat=prompt.chat is not None,
            request_id=request.headers.get("x-request-id") or uuid.uuid4().hex,
            created=int(time.time()),
            model=prompt.model,
            prompt_tokens=len(ids),
            replies=replies,
            top=options.top,
            finish_reason="stop" if options.limit is None else "length",
            include_usage=options.stream_options is not None and options.stream_options.include_usage,
            reports_cached=self._config.reports_cached,
        )

        def work(reply: Reply) -> EngineRequest:
            return EngineRequest(
                id=next(self._ids),
                prompt=ids,
                reply=reply.ids,
                salt=prompt.cache_salt,
                adapter=adapter,
                extra_key=extra_key,
                media=media,
                reports_hits=options.reports_hits,
            )

        with ExitStack() as stack:
            stack.enter_context(self._metrics.adapter(None if adapter is None else adapter.name))
            tickets = [stack.enter_context(rank.driver.request(work(reply))) for reply in replies]
            if prompt.stream:
                streamed = await self._stream(request, exchange, tickets, rank, received_at)
                self.answered(prompt, options, exchange, tickets[0].cached_tokens)
                return streamed
            await tickets[0].wait(0)
            self._metrics.first_token(rank, time.monotonic() - received_at)
            for ticket, reply in zip(tickets, replies, strict=True):
                await ticket.wait(len(reply.ids) - 1)
            cached = tickets[0].cached_tokens
            self._metrics.finished(exchange, cached, streamed=False)
            self.answered(prompt, options, exchange, cached)
            return json_response(exchange.answer(cached), headers=exchange.headers)

    def is_open(self, path: str) -> bool:
        """Whether a path needs no key. vLLM guards its APIs alone."""
        return not path.startswith(("/v1", "/v2", "/inference", "/cohere"))

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        key = self._config.api_key
        given = request.headers.get("Authorization", "")
        if key is None or self.is_open(request.path) or hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            return await handler(request)
        return json_response({"error": "Unauthorized"}, status=401)

    @web.middleware
    async def _refusals(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except RequestError as failure:
            status, body = self.refusal(request.path, failure)
        except TokenizeError as failure:
            status, body = self.refusal(request.path, InvalidRequest(str(failure)))
        return json_response(body, status=status)

    async def _stream(
        self,
        request: web.Request,
        exchange: api.Exchange,
        tickets: Sequence[Ticket],
        rank: EngineRank,
        received_at: float,
    ) -> web.StreamResponse:
        headers = {"content-type": "text/event-stream; charset=utf-8", **exchange.headers}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        lengths = [len(reply.ids) for reply in exchange.replies]
        seen = [0] * len(lengths)
        while seen != lengths:
            for index, ticket in enumerate(tickets):
                if seen[index] == lengths[index]:
                    continue
                generated = await ticket.wait(seen[index])
                opening = b""
                if not any(seen):
                    self._metrics.first_token(rank, time.monotonic() - received_at)
                    opening = exchange.opening()
                data = opening + exchange.pieces(index, seen[index], generated)
                seen[index] = generated
                if seen == lengths:
                    data += exchange.closing(tickets[0].cached_tokens)
                await response.write(data)
        self._metrics.finished(exchange, tickets[0].cached_tokens, streamed=True)
        await response.write_eof()
        return response

    async def _tokenize(self, request: web.Request) -> web.Response:
        query = api.decode(await request.read(), api.TokenizeRequest)
        await asyncio.sleep(self._config.tokenize_seconds)
        if query.model is not None:
            self._check_model(query.model)
        chat = query.chat
        special = query.add_special_tokens
        if chat is not None and self._media is not None and has_media(chat.messages):
            ids, _ = self._with_media(self._media, chat, api.MediaOptions(chat.messages))
        else:
            ids = self._encode(chat, query.prompt, add_special_tokens=chat is None if special is None else special)
        length = self._config.context_length
        return json_response({"count": len(ids), "max_model_len": length, "tokens": ids.tolist(), "token_strs": None})

    async def _reset(self, _: web.Request) -> web.Response:
        done = [rank.reset() for rank in self._ranks]
        return json_response({"success": all(done)})

    async def _models(self, _: web.Request) -> web.Response:
        return json_response(api.models(self._config, self._created))

    async def _event_sources(self, _: web.Request) -> web.Response:
        return json_response({str(rank.number): rank.publisher.source() for rank in self._ranks})

    async def _expose_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.render(), headers={"content-type": "text/plain; version=0.0.4"})

    async def _load(self, _: web.Request) -> web.Response:
        return json_response({"server_load": sum(rank.driver.in_flight for rank in self._ranks)})

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _version(self, _: web.Request) -> web.Response:
        return json_response({"version": _LOOKAHEAD_VERSION if self._config.layout.lookahead else _VERSION})

    def namespace(self, prompt: Prompt, body: bytes) -> tuple[Adapter | None, str | None]:
        """The request's adapter and `extra_key`. Raises `RequestError` for a model that is not served."""
        self._check_model(prompt.model)
        return self._config.adapter(prompt.model), None

    def read(self, prompt: Prompt, body: bytes) -> EnginePrompt:
        """The prompt's token ids and media. Raises `RequestError` or `TokenizeError`."""
        if prompt.token_ids is not None:
            return EnginePrompt(prompt.token_ids)
        chat = prompt.chat
        if chat is not None and self._media is not None and has_media(chat.messages):
            return self._with_media(self._media, chat, api.decode(body, api.MediaOptions))
        return EnginePrompt(self._encode(chat, prompt.text, add_special_tokens=prompt.add_special_tokens))

    def parse(self, path: str, body: bytes, options: api.GenerateOptions) -> Prompt:
        """The prompt of a request. Raises `RequestError`."""
        return requests.parse(path, body, _BOUNDS)

    def exchange(self, path: str, body: bytes, **fields: Any) -> api.Exchange:
        """The request's exchange."""
        return api.Exchange(**fields)

    def answered(self, prompt: Prompt, options: api.GenerateOptions, exchange: api.Exchange, cached: int) -> None:
        """A request is answered."""

    def error(self, failure: RequestError) -> tuple[int, api.Json]:
        """Status and body of an error answer."""
        return api.error(failure)

    def refusal(self, path: str, failure: RequestError) -> tuple[int, api.Json]:
        """Status and body of an error answer to a request for `path`."""
        return self.error(failure)

    def rank(self, request: web.Request, body: bytes) -> EngineRank:
        """The rank that the request names or, as with vLLM, any rank if the header is missing or not a number."""
        try:
            pinned = int(request.headers.get(RANK_HEADER, ""))
        except ValueError:
            return self._balancer.choose()
        if not 0 <= pinned < len(self._ranks):
            raise InvalidRequest(f"data_parallel_rank {pinned} is out of range [0, {len(self._ranks)}).")
        return self._ranks[pinned]

    def _check_model(self, name: str) -> None:
        if name not in self._config.names and name not in self._config.loras:
            raise UnknownModel(f"The model `{name}` does not exist.", param="model")

    def _encode(self, chat: Chat | None, text: str | None, *, add_special_tokens: bool) -> TokenIds:
        if chat is not None:
            text = self._tokenizer.render(chat)
        if text is None:
            raise InvalidRequest("expected `prompt` or `messages`")
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _with_media(self, reader: MediaReader, chat: Chat, options: api.MediaOptions) -> EnginePrompt:
        outline = self._tokenizer.encode(self._tokenizer.render_with_media(chat), add_special_tokens=False)
        return EnginePrompt(*reader.read(options.messages, outline, options.mm_processor_kwargs))

    def _reply_length(self, prompt_tokens: int, limit: int | None) -> int:
        if limit is not None and limit < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, got {limit}.", param="max_tokens")
        if not prompt_tokens:
            raise InvalidRequest("expected a prompt of at least one token", param="prompt")
        room = self._config.context_length - prompt_tokens
        if room < (limit or 1):
            raise InvalidRequest(
                f"This model's maximum context length is {self._config.context_length} tokens, but {prompt_tokens} "
                f"tokens of prompt and {limit or 1} of reply were requested.",
                param="input_tokens",
            )
        return min(self._config.default_max_tokens, room) if limit is None else limit


def json_response(data: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """An answer in JSON."""
    return web.Response(
        body=msgspec.json.encode(data), status=status, headers={"content-type": "application/json", **(headers or {})}
    )
