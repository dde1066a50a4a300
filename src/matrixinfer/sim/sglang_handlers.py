"""The simulated engine's HTTP API, with SGLang's paths."""

from __future__ import annotations

from typing import Any

import numpy as np
from aiohttp import web

from matrixinfer.blocks import TokenIds
from matrixinfer.errors import InvalidRequest, RequestError
from matrixinfer.prompt.base import Prompt
from matrixinfer.sim import api, sglang_api, sglang_chat
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.handlers import RANK_HEADER, EngineHandlers, EnginePrompt, json_response
from matrixinfer.sim.load_feed import TOPIC
from matrixinfer.sim.metrics import Metrics
from matrixinfer.sim.prefix_cache import Adapter
from matrixinfer.sim.rank import EngineRank
from matrixinfer.sim.sglang_api import Options, SglangExchange
from matrixinfer.sim.sglang_metrics import SglangMetrics


class SglangHandlers(EngineHandlers):
    """Answers requests as SGLang does."""

    def metrics(self, config: SimEngineConfig) -> Metrics:
        """The metrics that it exposes."""
        return SglangMetrics(config, self._ranks)

    def routes(self) -> list[web.RouteDef]:
        """All paths."""
        return [
            *self.common_routes(),
            web.post("/v1/tokenize", self._tokenize),
            web.get("/health_generate", self._health),
            web.get("/server_info", self._server_info),
            web.get("/get_server_info", self._server_info),
            web.get("/model_info", self._model_info),
            web.get("/get_model_info", self._model_info),
            web.get("/flush_cache", self._reset),
            web.post("/flush_cache", self._reset),
        ]

    def is_open(self, path: str) -> bool:
        """SGLang guards everything but health and metrics."""
        return path.startswith(("/health", "/metrics"))

    def namespace(self, prompt: Prompt, body: bytes) -> tuple[Adapter | None, str | None]:
        """The adapter of `model` (`base:adapter`) or `lora_path`, and the `extra_key`. Any other model is the served one."""
        options = api.decode(body, Options)
        _, separator, named = prompt.model.partition(":")
        name = named if separator and prompt.model not in self._config.names else options.lora_path
        adapter = None if name is None else self._config.adapter(name)
        if name is not None and adapter is None:
            raise InvalidRequest(f"Got LoRA adapter that has never been loaded: {name}")
        return adapter, options.extra_key

    def read(self, prompt: Prompt, body: bytes) -> EnginePrompt:
        """The prompt's token ids: `input_ids`, or as SGLang renders and encodes it."""
        if prompt.token_ids is not None:
            return EnginePrompt(prompt.token_ids)
        if prompt.chat is None:
            return EnginePrompt(self._encode(None, prompt.text, add_special_tokens=True))
        options = api.decode(body, Options)
        if options.input_ids is not None and self._config.takes_ids:
            return EnginePrompt(np.array(options.input_ids, dtype=np.uint32))
        return EnginePrompt(self._chat_ids(options, special=False))

    def exchange(self, path: str, body: bytes, **fields: Any) -> api.Exchange:
        """The request's exchange."""
        details = api.decode(body, Options).return_cached_tokens_details
        return SglangExchange(**fields, reports_details=details)

    def error(self, failure: RequestError) -> tuple[int, api.Json]:
        """Status and body of an error answer."""
        return sglang_api.error(failure)

    def rank(self, request: web.Request, body: bytes) -> EngineRank:
        """The rank that the header or the body names, or else any."""
        options, header = api.decode(body, Options), request.headers.get(RANK_HEADER)
        pinned = options.data_parallel_rank if options.routed_dp_rank is None else options.routed_dp_rank
        if header is not None:
            try:
                pinned = int(header)
            except ValueError:
                raise InvalidRequest(
                    f"Invalid X-Data-Parallel-Rank header: must be an integer, got '{header}'"
                ) from None
        if pinned is None:
            return self._balancer.choose()
        if not 0 <= pinned < len(self._ranks):
            raise InvalidRequest(f"routed_dp_rank={pinned} out of range [0, {len(self._ranks)})")
        return self._ranks[pinned]

    async def _tokenize(self, request: web.Request) -> web.Response:
        query = api.decode(await request.read(), sglang_api.TokenizeRequest)
        if (query.prompt is None) == (query.messages is None):
            raise InvalidRequest("Exactly one of 'prompt' or 'messages' must be provided.")
        length = self._config.context_length
        if isinstance(query.prompt, list):
            special = query.add_special_tokens is not False
            each = [self._encode(None, text, add_special_tokens=special).tolist() for text in query.prompt]
            return json_response({"tokens": each, "count": list(map(len, each)), "max_model_len": length})
        if query.prompt is not None:
            ids = self._encode(None, query.prompt, add_special_tokens=query.add_special_tokens is not False)
        else:
            special = query.add_generation_prompt is not None and query.add_special_tokens is True
            ids = self._chat_ids(query, special=special)
        return json_response({"tokens": ids.tolist(), "count": len(ids), "max_model_len": length})

    def _chat_ids(self, chat: Options | sglang_api.TokenizeRequest, *, special: bool) -> TokenIds:
        text, continued = sglang_chat.render(self._tokenizer, chat)
        ids = self._encode(None, text, add_special_tokens=special)
        if not continued:
            return ids
        return np.concatenate((ids, self._encode(None, continued, add_special_tokens=False)))

    async def _models(self, _: web.Request) -> web.Response:
        return json_response(sglang_api.models(self._config, self._created))

    async def _reset(self, _: web.Request) -> web.Response:
        done = all([rank.reset() for rank in self._ranks])  # noqa: C419 - each rank is to be reset
        text = "Cache flushed.\n" if done else "Flush cache failed.\n"
        return web.Response(text=text, status=200 if done else 400)

    async def _server_info(self, _: web.Request) -> web.Response:
        return json_response(sglang_api.server_info(self._config, self._kv_events()))

    async def _model_info(self, _: web.Request) -> web.Response:
        return json_response(sglang_api.model_info(self._config))

    def _kv_events(self) -> api.Json:
        """The block `kv_events` of `/server_info`."""
        first = self._ranks[0]
        events = {
            "publisher": "zmq",
            "endpoint_host": "*",
            "endpoint_port_base": _port(first.publisher.endpoint),
            "topic": self._config.topic,
            "block_size": self._config.block_size,
            "dp_size": len(self._ranks),
        }
        if first.load_feed is not None:
            events |= {"load_endpoint_port_base": _port(first.load_feed.endpoint), "load_topic": TOPIC}
        return events | {"replay_endpoint_port_base": _port(first.publisher.replay_endpoint)}


def _port(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])
