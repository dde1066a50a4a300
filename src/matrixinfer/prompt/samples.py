"""Sample prompts that are hard to tokenize, and the comparison of their token ids with an engine's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import msgspec

from matrixinfer.blocks import TokenIds
from matrixinfer.errors import TokenizeError
from matrixinfer.prompt.base import Prompt, first_difference
from matrixinfer.prompt.openai import CHAT_PATH, COMPLETIONS_PATH
from matrixinfer.prompt.remote import Engine, PromptRefused, RemoteTokenizer
from matrixinfer.prompt.requests import parse

Ours: TypeAlias = Callable[[Prompt], Awaitable[TokenIds | None]]
"""The gateway's own ids of a prompt; None if it asks the engine. Raises `TokenizeError`."""

HARD_TEXT = (
    "Größe: 1234567.89 km²\r\n\tnaïve, e\u0301t\u00e9\u00a0—\u200b「東京 2024」  한국어 العربية हिन्दी 🤷🏽‍♀️🇨🇭 "
    "don't WON'T   x_1 = [0xFF, -3e10]\n\n\n</s> <|end|> "
)


def _parts(*texts: str) -> Sequence[Mapping[str, str]]:
    """Content as clients send it that send a list: text parts."""
    return [{"type": "text", "text": text} for text in texts]


_SYSTEM = {"role": "system", "content": f"You are terse. {HARD_TEXT}"}
_MESSAGES = (
    {"role": "user", "content": f"  {HARD_TEXT}\n"},
    {"role": "assistant", "content": "Two\nlines. "},
    {"role": "user", "content": "And now?"},
)
_TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather in a city, in °C & %.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Zürich", "東京"]}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
)
_CALL = {"name": "get_weather", "arguments": '{"city": "Zürich", "days": 3}'}
_TOOL_TURNS = (
    {"role": "assistant", "content": "", "tool_calls": [{"id": "call12345", "type": "function", "function": _CALL}]},
    {"role": "tool", "tool_call_id": "call12345", "content": '{"celsius": -3.5, "note": "<b>Föhn</b>"}'},
)
_PARTS = (
    {"role": "user", "content": _parts("  First,", f"second. {HARD_TEXT}", "\nThird ")},
    {"role": "assistant", "content": "Two\nlines. "},
    {"role": "user", "content": _parts("And now?")},
)
_SYSTEM_PARTS = {"role": "system", "content": _parts("You are terse.", HARD_TEXT)}
_TOOL_PARTS = (
    {"role": "assistant", "content": _parts(" Asking. "), "tool_calls": _TOOL_TURNS[0]["tool_calls"]},
    {"role": "tool", "tool_call_id": "call12345", "content": _parts('{"celsius": -3.5}', "windy")},
)
OPTIONAL = "a chat with system prompt and tools"
SAMPLES: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "a text": (COMPLETIONS_PATH, {"prompt": HARD_TEXT}),
        "a chat": (CHAT_PATH, {"messages": _MESSAGES}),
        OPTIONAL: (CHAT_PATH, {"messages": (_SYSTEM, *_MESSAGES, *_TOOL_TURNS), "tools": _TOOLS}),
        "a chat with tools": (CHAT_PATH, {"messages": _MESSAGES, "tools": _TOOLS}),
        "a chat with content parts": (CHAT_PATH, {"messages": _PARTS}),
        "a chat with a system prompt in parts": (CHAT_PATH, {"messages": (_SYSTEM_PARTS, *_MESSAGES)}),
        "a chat with tools and parts": (CHAT_PATH, {"messages": (*_PARTS, *_TOOL_PARTS), "tools": _TOOLS}),
    }
)
"""By name: the API path, and the request body without `model`. Those after the first two are optional: not every chat
template supports them."""
_REQUIRED = ("a text", "a chat")
SAMPLED_CLASSES = ("text", "chat", "chat+tools")
"""The classes (see `request_class`) of those without parts, whose token ids are known whole in every request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFacts:
    """One sample prompt, tokenized by the gateway and by the engine."""

    name: str
    """For messages, such as `a text`."""
    optional: bool = False
    """Not every model accepts such a prompt."""
    gateway_error: str | None = None
    """Why the gateway could not tokenize it."""
    engine_error: str | None = None
    """Why the engine's ids are not known."""
    refused: bool = False
    """The engine refuses such a prompt, whenever it is asked."""
    compared: bool = False
    first_difference: int | None = None
    """Position of the first id that differs; None when all are equal."""

    @property
    def is_chat(self) -> bool:
        """Whether it is a chat."""
        return "chat" in self.name

    @property
    def is_equal(self) -> bool:
        """Whether both gave the same ids, or both refuse a prompt that not every model accepts."""
        if self.compared:
            return self.first_difference is None
        return self.optional and self.gateway_error is not None and self.refused


async def compare(
    ours: Ours, remote: RemoteTokenizer, engine: Engine, *, model: str, seconds: float
) -> Sequence[SampleFacts]:
    """Compare the gateway's ids of every sample with those of `engine`, whose name for the model is `model`."""
    return [
        await _compare(name, parse(path, msgspec.json.encode({"model": model, **body})), ours, remote, engine, seconds)
        for name, (path, body) in SAMPLES.items()
    ]


async def _compare(
    name: str, prompt: Prompt, ours: Ours, remote: RemoteTokenizer, engine: Engine, seconds: float
) -> SampleFacts:
    gateway_error = engine_error = None
    refused = False
    own: Sequence[int] = ()
    theirs: Sequence[int] = ()
    try:
        ids = await ours(prompt)
        if ids is None:
            return SampleFacts(name=name)
        own = ids.tolist()
    except TokenizeError as error:
        gateway_error = str(error)
    try:
        theirs = (await remote.tokenize(prompt, [engine], prompt.model, timeout_seconds=seconds)).tolist()
    except TokenizeError as error:
        engine_error, refused = str(error), isinstance(error, PromptRefused)
    if gateway_error is not None or engine_error is not None:
        return SampleFacts(
            name=name,
            gateway_error=gateway_error,
            engine_error=engine_error,
            refused=refused,
            optional=name not in _REQUIRED,
        )
    return SampleFacts(name=name, compared=True, first_difference=first_difference(own, theirs))
