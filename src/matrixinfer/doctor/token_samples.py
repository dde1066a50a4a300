"""Prompts that are hard to tokenize alike, and their comparison with an engine's ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

from matrixinfer.doctor.facts import SampleFacts
from matrixinfer.errors import TokenizeError
from matrixinfer.pods.registry import Pod
from matrixinfer.prompt.base import first_difference
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.openai import CHAT_PATH, COMPLETIONS_PATH
from matrixinfer.prompt.remote import RemoteTokenizer

HARD_TEXT = (
    "Größe: 1234567.89 km²\r\n\tnaïve, e\u0301t\u00e9\u00a0—\u200b「東京 2024」  한국어 العربية हिन्दी 🤷🏽‍♀️🇨🇭 "
    "don't WON'T   x_1 = [0xFF, -3e10]\n\n\n</s> <|end|> "
)
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
_CALLED = (
    {"role": "assistant", "content": "", "tool_calls": [{"id": "call12345", "type": "function", "function": _CALL}]},
    {"role": "tool", "tool_call_id": "call12345", "content": '{"celsius": -3.5, "note": "<b>Föhn</b>"}'},
)
OPTIONAL = "a chat with system prompt and tools"
"""Not every template takes these."""
SAMPLES: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "a text": (COMPLETIONS_PATH, {"prompt": HARD_TEXT}),
        "a chat": (CHAT_PATH, {"messages": _MESSAGES}),
        OPTIONAL: (CHAT_PATH, {"messages": (_SYSTEM, *_MESSAGES, *_CALLED), "tools": _TOOLS}),
    }
)
"""What it is called, and its API and body but for the model."""


async def compare(
    tokenizers: TokenizerManager, remote: RemoteTokenizer, pod: Pod, *, configured: str, seconds: float
) -> Sequence[SampleFacts]:
    """Every sample's ids as the gateway gets them for the model `configured`, held against those of `pod`."""
    return [
        await _compare(what, path, body, tokenizers, remote, pod, configured, seconds)
        for what, (path, body) in SAMPLES.items()
    ]


async def _compare(
    what: str,
    path: str,
    body: Mapping[str, Any],
    tokenizers: TokenizerManager,
    remote: RemoteTokenizer,
    pod: Pod,
    configured: str,
    seconds: float,
) -> SampleFacts:
    model = pod.base_model or configured
    prompt = await tokenizers.read(path, msgspec.json.encode({"model": model, **body}))
    here = there = None
    ours: Sequence[int] = ()
    try:
        tokenized = await tokenizers.tokenize(prompt, model=configured, engines=[pod])
        if tokenized.source == "remote":
            return SampleFacts(what=what)
        ours = tokenized.tokens.ids.tolist()
    except TokenizeError as error:
        here = str(error)
    try:
        theirs = (await remote.tokenize(prompt, [pod], model, timeout_seconds=seconds)).tolist()
    except TokenizeError as error:
        there = str(error)
    if here is not None or there is not None:
        return SampleFacts(what=what, here=here, there=there, optional=what == OPTIONAL)
    return SampleFacts(what=what, compared=True, first_difference=first_difference(ours, theirs))
