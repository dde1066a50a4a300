"""vLLM's JSON: the fields of requests that the simulated engine reads, and all its answers. See also `sglang_api`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import msgspec

from matrixinfer.errors import UNREADABLE, InvalidRequest, RequestError, UnknownModel
from matrixinfer.prompt.base import Chat
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.logprobs import chat_logprobs, completion_logprobs
from matrixinfer.sim.reply import Reply

Json: TypeAlias = dict[str, Any]
T = TypeVar("T")


class StreamOptions(msgspec.Struct, frozen=True):
    """`stream_options`."""

    include_usage: bool = False


class GenerateOptions(msgspec.Struct, frozen=True):
    """The fields that shape the reply. `prompt.openai` parses the prompt; other fields are ignored."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    stream_options: StreamOptions | None = None
    vllm_xargs: Json | None = None
    logprobs: bool | int | None = None
    top_logprobs: int | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    store: bool = True

    @property
    def top(self) -> int | None:
        """How many alternatives are shown with the log-probability of each token; None shows none of them."""
        if self.logprobs is None or self.logprobs is False:
            return None
        return self.top_logprobs or 0 if self.logprobs is True else self.logprobs

    @property
    def reports_hits(self) -> bool:
        """Whether KV events should report reused blocks, too."""
        return self.vllm_xargs is not None and self.vllm_xargs.get("kv_cache_report_mode") == "full"

    @property
    def limit(self) -> int | None:
        """Maximum number of tokens to generate."""
        named = (self.max_completion_tokens, self.max_output_tokens, self.max_tokens)
        return next((each for each in named if each is not None), None)


class MediaOptions(msgspec.Struct, frozen=True):
    """What a chat with images, audio or video says of them, also in bodies that `prompt.openai` reads without them."""

    messages: list[Json]
    mm_processor_kwargs: Json | None = None


class TokenizeRequest(msgspec.Struct, frozen=True):
    """A request to `/tokenize`: a text or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Json] | None = None
    tools: list[Json] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: Json | None = None

    @property
    def chat(self) -> Chat | None:
        """The chat, if the request has one."""
        if self.messages is None:
            return None
        return Chat(
            messages=self.messages,
            tools=self.tools,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            chat_template=self.chat_template,
            chat_template_kwargs=self.chat_template_kwargs,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One generation request and its replies, in the form that answers need."""

    chat: bool
    request_id: str
    created: int
    model: str
    prompt_tokens: int
    replies: tuple[Reply, ...]
    """One for each choice."""
    finish_reason: str
    include_usage: bool
    reports_cached: bool = True
    """`usage` reports how many prompt tokens were cached."""
    top: int | None = None
    """How many alternatives of each token are shown with its log-probability; None shows none of them."""

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        return {"x-request-id": self.request_id}

    def answer(self, cached_tokens: int) -> Json:
        """The whole reply in one body."""
        kind = "chat.completion" if self.chat else "text_completion"
        choices = [self.choice(index, reply) for index, reply in enumerate(self.replies)]
        return self._envelope(kind, choices) | {"usage": self.usage(cached_tokens)}

    def choice(self, index: int, reply: Reply) -> Json:
        """One choice of the whole reply."""
        content: Json = {"text": reply.text}
        if self.chat:
            content = {"message": {"role": "assistant", "content": reply.text}}
        shown = self._logprobs(reply, 0, len(reply.ids))
        return {
            "index": index,
            **content,
            "logprobs": shown,
            "finish_reason": self.finish_reason,
            "stop_reason": None,
        }

    def opening(self) -> bytes:
        """Server-sent events before the first token."""
        if not self.chat:
            return b""
        delta = {"delta": {"role": "assistant", "content": ""}}
        return b"".join(self._chunk(index, delta, None, None) for index in range(len(self.replies)))

    def pieces(self, index: int, start: int, end: int) -> bytes:
        """Server-sent events for the tokens [start, end) of a choice."""
        reply, parts = self.replies[index], []
        for position in range(start, end):
            piece = reply.pieces[position]
            content = {"delta": {"content": piece}} if self.chat else {"text": piece}
            finish = self.finish_reason if position == len(reply.ids) - 1 else None
            parts.append(self._chunk(index, content, finish, self._logprobs(reply, position, position + 1)))
        return b"".join(parts)

    def closing(self, cached_tokens: int) -> bytes:
        """Server-sent events after the last token."""
        done = b"data: [DONE]\n\n"
        if not self.include_usage:
            return done
        return event(self._envelope(self._chunk_kind, []) | {"usage": self.usage(cached_tokens)}) + done

    @property
    def generated(self) -> int:
        """Tokens of all replies."""
        return sum(len(reply.ids) for reply in self.replies)

    def usage(self, cached_tokens: int) -> Json:
        """`usage` of the answer."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.generated,
            "completion_tokens": self.generated,
            "prompt_tokens_details": {"cached_tokens": cached_tokens} if self.reports_cached else None,
        }

    def _logprobs(self, reply: Reply, start: int, end: int) -> Json | None:
        if self.top is None:
            return None
        shown = chat_logprobs if self.chat else completion_logprobs
        return shown(reply.pieces[start:end], self.top, len("".join(reply.pieces[:start])))

    def _chunk(self, index: int, content: Json, finish_reason: str | None, logprobs: Json | None) -> bytes:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        return event(self._envelope(self._chunk_kind, [choice]))

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        name = f"chatcmpl-{self.request_id}" if self.chat else f"cmpl-{self.request_id}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"


def models(config: SimEngineConfig, created: int) -> Json:
    """The answer of `/v1/models`: the served names, then the adapters."""
    shared = {"object": "model", "created": created, "owned_by": "vllm"}
    base = {"root": config.model, "parent": None, "max_model_len": config.context_length}
    adapter = {"parent": config.names[0], "max_model_len": None}
    served = [{"id": name, **shared, **base} for name in config.names]
    return {
        "object": "list",
        "data": served + [{"id": name, **shared, "root": name, **adapter} for name in config.loras],
    }


def error(failure: RequestError) -> tuple[int, Json]:
    """Status and body of an error answer."""
    status, kind = (404, "NotFoundError") if isinstance(failure, UnknownModel) else (400, "BadRequestError")
    return status, {"error": {"message": failure.message, "type": kind, "param": failure.param, "code": status}}


def decode(body: bytes, kind: type[T]) -> T:
    """Decode a request body. Raises `InvalidRequest`."""
    try:
        return msgspec.json.decode(body, type=kind)
    except UNREADABLE as failure:
        raise InvalidRequest(str(failure)) from failure


def event(data: Json) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"
