"""Anthropic's Messages API, as vLLM answers it."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from matrixinfer.errors import RequestError
from matrixinfer.sim.api import Exchange, Json
from matrixinfer.sim.reply import Reply

_ERRORS = {400: "invalid_request_error", 404: "not_found_error"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MessagesExchange(Exchange):
    """One message and its reply."""

    def answer(self, cached_tokens: int) -> Json:
        """The whole reply in one body."""
        text = {"type": "text", "text": self.replies[0].text}
        return self._message([text]) | {"stop_reason": self._stop_reason, "usage": self._usage(cached_tokens)}

    def opening(self) -> bytes:
        """The message begins; vLLM does not know yet what was cached."""
        usage = {"input_tokens": self.prompt_tokens, "output_tokens": 0}
        return _event({"type": "message_start", "message": self._message([]) | {"stop_reason": None, "usage": usage}})

    def pieces(self, index: int, start: int, end: int) -> bytes:
        """The tokens [start, end), and the beginning and the end of the block that they make."""
        reply: Reply = self.replies[index]
        parts = []
        if start == 0:
            block = {"type": "text", "text": ""}
            parts.append(_event({"type": "content_block_start", "index": 0, "content_block": block}))
        for piece in reply.pieces[start:end]:
            delta = {"type": "text_delta", "text": piece}
            parts.append(_event({"type": "content_block_delta", "index": 0, "delta": delta}))
        if end == len(reply.ids):
            parts.append(_event({"type": "content_block_stop", "index": 0}))
        return b"".join(parts)

    def closing(self, cached_tokens: int) -> bytes:
        """The message ends."""
        delta = {"stop_reason": self._stop_reason, "stop_sequence": None}
        end = _event({"type": "message_delta", "delta": delta, "usage": self._usage(cached_tokens)})
        return end + _event({"type": "message_stop"})

    @property
    def _stop_reason(self) -> str:
        return "end_turn" if self.finish_reason == "stop" else "max_tokens"

    def _message(self, content: list[Json]) -> Json:
        head = {"id": f"chatcmpl-{self.request_id}", "type": "message", "role": "assistant"}
        return {**head, "content": content, "model": self.model, "stop_sequence": None}

    def _usage(self, cached_tokens: int) -> Json:
        cached = {"cache_read_input_tokens": cached_tokens} if self.reports_cached else {}
        fresh = self.prompt_tokens - (cached_tokens if self.reports_cached else 0)
        return {"input_tokens": fresh, "output_tokens": self.generated, **cached}


def error(failure: RequestError, status: int) -> Json:
    """The body of an error answer."""
    kind = _ERRORS.get(status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": failure.message}}


def _event(data: Json) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (data["type"].encode(), msgspec.json.encode(data))
