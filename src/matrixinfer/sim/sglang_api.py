"""SGLang's JSON: the fields of requests that vLLM does not have, and its answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from matrixinfer.errors import InvalidRequest, RequestError
from matrixinfer.sim.api import Exchange, Json, event
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.reply import Reply

VERSION = "0.5.23"
"""The SGLang release whose API and event layout the engine has."""


class Options(msgspec.Struct, frozen=True):
    """Fields of chats and completions. `prompt.openai` parses the prompt."""

    model: str = ""
    routed_dp_rank: int | None = None
    data_parallel_rank: int | None = None
    """The old name of the former."""
    extra_key: str | None = None
    lora_path: str | None = None
    return_cached_tokens_details: bool = False
    messages: list[Json] = []
    tools: list[Json] | None = None
    tool_choice: Any = None
    reasoning_effort: Any = None
    continue_final_message: bool = False
    chat_template_kwargs: Json | None = None
    input_ids: list[int] | None = None


class TokenizeRequest(msgspec.Struct, frozen=True):
    """A request to `/tokenize`: a text, texts, or a chat."""

    prompt: str | list[str] | None = None
    messages: list[Json] | None = None
    tools: list[Json] | None = None
    tool_choice: Any = None
    reasoning_effort: Any = None
    continue_final_message: bool = False
    chat_template_kwargs: Json | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangExchange(Exchange):
    """One generation request and its reply, in SGLang's shape."""

    reports_details: bool = False
    """The answer says from which tier the cached tokens came."""

    @property
    def headers(self) -> dict[str, str]:
        """SGLang sends none of its own."""
        return {}

    def choice(self, index: int, reply: Reply) -> Json:
        """One choice of the whole reply."""
        message = {"role": "assistant", "content": reply.text, "reasoning_content": None, "tool_calls": None}
        return {
            "index": index,
            **({"message": message} if self.chat else {"text": reply.text}),
            "logprobs": self._logprobs(reply, 0, len(reply.ids)),
            "finish_reason": self.finish_reason,
            "matched_stop": None,
        }

    def answer(self, cached_tokens: int) -> Json:
        """The whole reply in one body."""
        return {
            "id": self.request_id,
            "object": "chat.completion" if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [self.choice(index, reply) for index, reply in enumerate(self.replies)],
            "usage": self.usage(cached_tokens),
            "metadata": {"weight_version": "default"},
            **self._extension(cached_tokens),
        }

    def closing(self, cached_tokens: int) -> bytes:
        """As `Exchange.closing`; the details of cached tokens come before the usage."""
        done = b"data: [DONE]\n\n"
        parts = super(SglangExchange, self).closing(cached_tokens)
        if not self.reports_details:
            return parts
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        head = {"id": self.request_id, "object": kind, "created": self.created, "model": self.model, "choices": []}
        return parts.removesuffix(done) + event(head | self._extension(cached_tokens)) + done

    def usage(self, cached_tokens: int) -> Json:
        """`usage` of the answer."""
        return super(SglangExchange, self).usage(cached_tokens) | {
            "reasoning_tokens": 0,
            "completion_tokens_details": None,
        }

    def _extension(self, cached_tokens: int) -> Json:
        if not self.reports_details:
            return {}
        return {"sglext": {"cached_tokens_details": {"device": cached_tokens, "host": 0}}}


def models(config: SimEngineConfig, created: int) -> Json:
    """The answer of `/v1/models`: one name, then the adapters."""
    (name, *_), shared = config.names, {"object": "model", "created": created, "owned_by": "sglang"}
    base = {"id": name, **shared, "root": name, "parent": None, "max_model_len": config.context_length}
    adapters = [{"id": lora, **shared, "root": lora, "parent": name, "max_model_len": None} for lora in config.loras]
    return {"object": "list", "data": [base, *adapters]}


def server_info(config: SimEngineConfig, events: Json) -> Json:
    """The answer of `/server_info`: some of the server's arguments, and its publisher of KV events."""
    base, host = events["endpoint_port_base"], events["endpoint_host"]
    arguments = {
        "publisher": events["publisher"],
        "endpoint": f"tcp://{host}:{base}",
        "replay_endpoint": f"tcp://{host}:{events['replay_endpoint_port_base']}",
        "topic": events["topic"],
    }
    return {
        "model_path": config.model,
        "served_model_name": config.names[0],
        "tp_size": 1,
        "dp_size": config.data_parallel_size,
        "page_size": config.block_size,
        "context_length": config.context_length,
        "chat_template": None,
        "max_total_num_tokens": config.cache_tokens,
        "max_running_requests": config.max_sequences,
        "enable_cache_report": config.cache_report,
        "disable_radix_cache": not config.prefix_caching,
        "speculative_algorithm": "EAGLE" if config.speculative else None,
        "kv_events_config": msgspec.json.encode(arguments).decode(),
        "kv_events": events,
        "version": VERSION,
    }


def model_info(config: SimEngineConfig) -> Json:
    """The answer of `/model_info`."""
    return {
        "model_path": config.model,
        "served_model_name": config.names[0],
        "tokenizer_path": config.model,
        "is_generation": True,
        "weight_version": "default",
        "architectures": None,
    }


def error(failure: RequestError) -> tuple[int, Json]:
    """Status and body of an error answer."""
    status = 400 if isinstance(failure, InvalidRequest) else 404
    return status, {
        "object": "error",
        "message": failure.message,
        "type": "BadRequest",
        "param": failure.param,
        "code": status,
    }
