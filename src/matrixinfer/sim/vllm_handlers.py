"""The paths of vLLM that SGLang's simulated engine does not have: other APIs, adapters at run time, and audio."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
from aiohttp import web

from matrixinfer.blocks import TokenIds
from matrixinfer.errors import InvalidRequest, RequestError, UnknownModel, UnknownResponse
from matrixinfer.prompt import anthropic, openai, responses
from matrixinfer.prompt.base import Chat, Prompt
from matrixinfer.prompt.conversation import has_media
from matrixinfer.sim import api, messages_api, pooling_api
from matrixinfer.sim.forwarded_ids import forwarded_ids, without_ids
from matrixinfer.sim.handlers import EngineHandlers, EnginePrompt, json_response
from matrixinfer.sim.messages_api import MessagesExchange
from matrixinfer.sim.model import EngineRequest
from matrixinfer.sim.responses_api import ResponsesExchange, Stored, StoredAnswers

_AUDIO_BYTES_PER_SECOND = 32_000
"""16-bit samples at 16 kHz."""


class _Adapter(msgspec.Struct, frozen=True):
    lora_name: str
    lora_path: str = ""


class _Named(msgspec.Struct, frozen=True):
    request_id: str | None = None


class _Detokenize(msgspec.Struct, frozen=True):
    tokens: list[int]
    model: str | None = None


class VllmHandlers(EngineHandlers):
    """Answers requests as vLLM does."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._stored = StoredAnswers()

    def routes(self) -> list[web.RouteDef]:
        """All paths."""
        pooled = {"/v1/embeddings": self._embed, "/pooling": self._pool, "/classify": self._classify}
        scored = {
            **dict.fromkeys(("/score", "/v1/score"), self._score),
            **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), self._rerank),
        }
        return [
            *super().routes(),
            web.post(anthropic.MESSAGES_PATH, self._generate),
            web.post(anthropic.COUNT_PATH, self._count),
            web.post(responses.RESPONSES_PATH, self._generate),
            web.get(f"{responses.RESPONSES_PATH}/{{id}}", self._retrieve),
            web.post(f"{responses.RESPONSES_PATH}/{{id}}/cancel", self._cancel),
            web.post("/detokenize", self._detokenize),
            web.post("/v1/audio/transcriptions", self._transcribe),
            web.post("/v1/audio/translations", self._transcribe),
            web.post("/v1/load_lora_adapter", self._load_adapter),
            web.post("/v1/unload_lora_adapter", self._unload_adapter),
            *(web.post(path, handler) for path, handler in {**pooled, **scored}.items()),
        ]

    def parse(self, path: str, body: bytes, options: api.GenerateOptions) -> Prompt:
        """The prompt; of a response that continues another one, with the conversation that is stored."""
        previous = options.previous_response_id
        if path == openai.CHAT_PATH:
            body = without_ids(body)
        if path != responses.RESPONSES_PATH or previous is None:
            return super().parse(path, body, options)
        stored = self._stored.get(previous)
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        del fields["previous_response_id"]
        prompt = super().parse(path, msgspec.json.encode(fields), options)
        if prompt.chat is None:
            raise InvalidRequest("expected `input`", param="input")
        chat = msgspec.structs.replace(prompt.chat, messages=[*stored.messages, *prompt.chat.messages])
        return msgspec.structs.replace(prompt, chat=chat)

    def read(self, prompt: Prompt, body: bytes) -> EnginePrompt:
        """The prompt's token ids and media; those that a chat brings, where the engine uses them."""
        if prompt.path == openai.CHAT_PATH and self._config.takes_ids:
            ids = forwarded_ids(body)
            if ids is not None and prompt.chat is not None and not has_media(prompt.chat.messages):
                return EnginePrompt(ids)
        return super().read(prompt, body)

    def exchange(self, path: str, body: bytes, **fields: Any) -> api.Exchange:
        """The request's exchange, in the shape of its API."""
        if path == anthropic.MESSAGES_PATH:
            return MessagesExchange(**fields)
        if path == responses.RESPONSES_PATH:
            previous = api.decode(body, api.GenerateOptions).previous_response_id
            given = api.decode(body, _Named).request_id
            return ResponsesExchange(**{**fields, "request_id": uuid.uuid4().hex}, previous=previous, given_id=given)
        return super().exchange(path, body, **fields)

    def answered(self, prompt: Prompt, options: api.GenerateOptions, exchange: api.Exchange, cached: int) -> None:
        """Store a response."""
        if isinstance(exchange, ResponsesExchange) and options.store and prompt.chat is not None:
            reply = {"role": "assistant", "content": exchange.replies[0].text}
            self._stored.add(exchange.id, Stored(exchange.answer(cached), [*prompt.chat.messages, reply]))

    def refusal(self, path: str, failure: RequestError) -> tuple[int, api.Json]:
        """Status and body of an error answer, in the shape of its API."""
        status, body = self.error(failure)
        if isinstance(failure, UnknownResponse):
            status = 404
            body = {"error": {**body["error"], "type": "invalid_request_error", "code": 404}}
        return status, messages_api.error(failure, status) if path.startswith(anthropic.MESSAGES_PATH) else body

    async def _count(self, request: web.Request) -> web.Response:
        body = await request.read()
        prompt = anthropic.message(request.path, body)
        self.namespace(prompt, body)
        return json_response({"input_tokens": len(self.read(prompt, body).ids)})

    async def _retrieve(self, request: web.Request) -> web.Response:
        return json_response(self._stored.get(request.match_info["id"]).answer)

    async def _cancel(self, request: web.Request) -> web.Response:
        self._stored.get(request.match_info["id"])
        raise InvalidRequest("Cannot cancel a synchronous response.", param="response_id")

    async def _detokenize(self, request: web.Request) -> web.Response:
        query = api.decode(await request.read(), _Detokenize)
        if query.model is not None:
            self._check_model(query.model)
        text = self._tokenizer.decode(np.array(query.tokens, dtype=np.uint32))
        return json_response({"prompt": text.decode("utf-8", "replace")})

    async def _transcribe(self, request: web.Request) -> web.Response:
        """What the audio says is made up from its bytes."""
        form = await request.post()
        upload, model = form.get("file"), form.get("model")
        if not isinstance(upload, web.FileField):
            raise InvalidRequest("expected an upload", param="file")
        if isinstance(model, str) and model:
            self._check_model(model)
        content = upload.file.read()
        seconds = max(1, len(content) // _AUDIO_BYTES_PER_SECOND)
        ids = np.frombuffer(content[:64].ljust(64), dtype=np.uint8).astype(np.uint32)
        text = self._writer.write(ids, min(64, 2 * seconds)).text
        kind = form.get("response_format", "json")
        if kind == "text":
            return web.Response(text=text)
        if kind == "verbose_json":
            return json_response({"text": text, "language": "en", "duration": str(seconds), "segments": []})
        return json_response({"text": text, "usage": {"type": "duration", "seconds": seconds}})

    async def _load_adapter(self, request: web.Request) -> web.Response:
        adapter = api.decode(await request.read(), _Adapter)
        if not adapter.lora_name or not adapter.lora_path:
            raise InvalidRequest("Both 'lora_name' and 'lora_path' must be provided.")
        if adapter.lora_name in self._config.loras:
            raise InvalidRequest(f"The lora adapter '{adapter.lora_name}' has already been loaded.")
        self._config = replace(self._config, loras=(*self._config.loras, adapter.lora_name))
        return web.Response(text=f"Success: LoRA adapter '{adapter.lora_name}' added successfully.")

    async def _unload_adapter(self, request: web.Request) -> web.Response:
        name = api.decode(await request.read(), _Adapter).lora_name
        if name not in self._config.loras:
            raise UnknownModel(f"The lora adapter '{name}' cannot be found.")
        self._config = replace(self._config, loras=tuple(each for each in self._config.loras if each != name))
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def _embed(self, request: web.Request) -> web.Response:
        query, prompts = await self._pooling(request)
        vectors = [pooling_api.vector(ids.tobytes(), query.dimensions) for ids in prompts]
        data = [pooling_api.embedding(i, values, query.encoding_format) for i, values in enumerate(vectors)]
        return self._pooled("embd", query.model, data, prompts)

    async def _pool(self, request: web.Request) -> web.Response:
        query, prompts = await self._pooling(request)
        data = [pooling_api.pooled(i, pooling_api.vector(ids.tobytes(), None)) for i, ids in enumerate(prompts)]
        return self._pooled("pool", query.model, data, prompts)

    async def _classify(self, request: web.Request) -> web.Response:
        query, prompts = await self._pooling(request)
        data = [pooling_api.classified(i, pooling_api.vector(ids.tobytes(), None)) for i, ids in enumerate(prompts)]
        return self._pooled("classify", query.model, data, prompts)

    async def _score(self, request: web.Request) -> web.Response:
        query = api.decode(await request.read(), pooling_api.ScoreRequest)
        self._check_model(query.model)
        prompts = [self._pair(*pair) for pair in query.pairs]
        await self._compute(request, prompts)
        scores = [
            {"index": i, "object": "score", "score": pooling_api.score(x.tobytes())} for i, x in enumerate(prompts)
        ]
        return self._pooled("score", query.model, scores, prompts)

    async def _rerank(self, request: web.Request) -> web.Response:
        query = api.decode(await request.read(), pooling_api.RerankRequest)
        self._check_model(query.model)
        prompts = [self._pair(query.query, document) for document in query.documents]
        await self._compute(request, prompts)
        scores = [pooling_api.score(ids.tobytes()) for ids in prompts]
        name = f"rerank-{uuid.uuid4().hex}"
        return json_response(pooling_api.ranking(name, query.model, query, scores, sum(map(len, prompts))))

    async def _pooling(self, request: web.Request) -> tuple[pooling_api.PoolingRequest, Sequence[TokenIds]]:
        query = api.decode(await request.read(), pooling_api.PoolingRequest)
        self._check_model(query.model)
        if query.messages is not None:
            prompts = [self._encode(Chat(messages=query.messages), None, add_special_tokens=False)]
        else:
            prompts = [
                self._encode(None, each, add_special_tokens=True)
                if isinstance(each, str)
                else np.array(each, dtype=np.uint32)
                for each in pooling_api.inputs(query)
            ]
        await self._compute(request, prompts)
        return query, prompts

    def _pair(self, query: str, document: str) -> TokenIds:
        first = self._encode(None, query, add_special_tokens=True)
        return np.concatenate((first, self._encode(None, document, add_special_tokens=False)))

    async def _compute(self, request: web.Request, prompts: Sequence[TokenIds]) -> None:
        """Compute prompts one after the other. A token of reply stands for the work of the pooler."""
        rank = self.rank(request, b"")
        for ids in prompts:
            self._reply_length(len(ids), 1)
            work = EngineRequest(id=next(self._ids), prompt=ids, reply=(int(ids[-1]),))
            with rank.driver.request(work) as ticket:
                await ticket.wait(0)

    def _pooled(self, kind: str, model: str, data: list[api.Json], prompts: Sequence[TokenIds]) -> web.Response:
        name = f"{kind}-{uuid.uuid4().hex}"
        tokens = sum(map(len, prompts))
        return json_response(pooling_api.envelope(name, model, int(time.time()), data, tokens))
