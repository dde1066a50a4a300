"""OpenAI's Responses API, as vLLM answers it, and the responses that an engine stores."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from matrixinfer.errors import UnknownResponse
from matrixinfer.sim.api import Exchange, Json

MOST_STORED = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesExchange(Exchange):
    """One request for a response, and the reply."""

    previous: str | None = None
    """The id of the response that it continues."""
    given_id: str | None = None
    """The id that the request asks for."""

    @property
    def id(self) -> str:
        """The id of the response."""
        return self.given_id or f"resp_{self.request_id}"

    def answer(self, cached_tokens: int) -> Json:
        """The whole reply in one body."""
        return self._response("completed", [self._item("completed", self.replies[0].text)], cached_tokens)

    def opening(self) -> bytes:
        """The response and its only item begin."""
        response = self._response("in_progress", [], None)
        return b"".join(
            (
                self._event("response.created", 0, response=response),
                self._event("response.in_progress", 1, response=response),
                self._event("response.output_item.added", 2, output_index=0, item=self._item("in_progress", None)),
                self._event("response.content_part.added", 3, **self._place, part=_text("")),
            )
        )

    def pieces(self, index: int, start: int, end: int) -> bytes:
        """The tokens [start, end)."""
        pieces = self.replies[index].pieces
        return b"".join(
            self._event("response.output_text.delta", 4 + at, **self._place, delta=pieces[at], logprobs=[])
            for at in range(start, end)
        )

    def closing(self, cached_tokens: int) -> bytes:
        """The item and the response end."""
        text, number = self.replies[0].text, 4 + self.generated
        done = self._item("completed", text)
        response = self._response("completed", [done], cached_tokens)
        return b"".join(
            (
                self._event("response.output_text.done", number, **self._place, text=text, logprobs=[]),
                self._event("response.content_part.done", number + 1, **self._place, part=_text(text)),
                self._event("response.output_item.done", number + 2, output_index=0, item=done),
                self._event("response.completed", number + 3, response=response),
            )
        )

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self.request_id}", "output_index": 0, "content_index": 0}

    def _event(self, kind: str, number: int, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": number, **fields}
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(data))

    def _item(self, status: str, text: str | None) -> Json:
        content = [] if text is None else [_text(text)]
        head = {"id": f"msg_{self.request_id}", "type": "message", "role": "assistant"}
        return {**head, "status": status, "content": content}

    def _response(self, status: str, output: list[Json], cached_tokens: int | None) -> Json:
        usage = None
        if cached_tokens is not None:
            usage = {
                "input_tokens": self.prompt_tokens,
                "input_tokens_details": {"cached_tokens": cached_tokens if self.reports_cached else 0},
                "output_tokens": self.generated,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": self.prompt_tokens + self.generated,
            }
        return {
            "id": self.id,
            "created_at": self.created,
            "model": self.model,
            "object": "response",
            "output": output,
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "background": False,
            "previous_response_id": self.previous,
            "status": status,
            "truncation": "disabled",
            "usage": usage,
        }


class Stored(NamedTuple):
    """A response that is stored."""

    answer: Json
    messages: list[Json]
    """The conversation up to its end."""


class StoredAnswers:
    """The last responses. vLLM keeps all of them."""

    def __init__(self) -> None:
        self._stored: OrderedDict[str, Stored] = OrderedDict()

    def add(self, identity: str, stored: Stored) -> None:
        """Store a response."""
        self._stored[identity] = stored
        if len(self._stored) > MOST_STORED:
            self._stored.popitem(last=False)

    def get(self, identity: str) -> Stored:
        """A stored response. Raises `UnknownResponse`."""
        found = self._stored.get(identity)
        if found is None:
            raise UnknownResponse(f"Response with id '{identity}' not found.", param="response_id")
        return found


def _text(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": None}
