"""Sample prompts that are hard to tokenize, and the comparison of their token ids with an engine's."""

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
_TOOL_TURNS = (
    {"role": "assistant", "content": "", "tool_calls": [{"id": "call12345", "type": "function", "function": _CALL}]},
    {"role": "tool", "tool_call_id": "call12345", "content": '{"celsius": -3.5, "note": "<b>Föhn</b>"}'},
)
OPTIONAL = "a chat with system prompt and tools"
"""Not every chat template supports these."""
SAMPLES: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "a text": (COMPLETIONS_PATH, {"prompt": HARD_TEXT}),
        "a chat": (CHAT_PATH, {"messages": _MESSAGES}),
        OPTIONAL: (CHAT_PATH, {"messages": (_SYSTEM, *_MESSAGES, *_TOOL_TURNS), "tools": _TOOLS}),
    }
)
"""By name: the API path, and the request body without `model`."""


async def compare(
    tokenizers: TokenizerManager, remote: RemoteTokenizer, pod: Pod, *, configured: str, seconds: float
) -> Sequence[SampleFacts]:
    """Compare the gateway's ids of every sample, for the model `configured`, with those of `pod`."""
    return [
        await _compare(name, path, body, tokenizers, remote, pod, configured, seconds)
        for name, (path, body) in SAMPLES.items()
    ]


async def _compare(
    name: str,
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
    gateway_error = engine_error = None
    ours: Sequence[int] = ()
    try:
        tokenized = await tokenizers.tokenize(prompt, model=configured, engines=[pod])
        if tokenized.source == "remote":
            return SampleFacts(name=name)
        ours = tokenized.tokens.ids.tolist()
    except TokenizeError as error:
        gateway_error = str(error)
    try:
        theirs = (await remote.tokenize(prompt, [pod], model, timeout_seconds=seconds)).tolist()
    except TokenizeError as error:
        engine_error = str(error)
    if gateway_error is not None or engine_error is not None:
        return SampleFacts(name=name, gateway_error=gateway_error, engine_error=engine_error, optional=name == OPTIONAL)
    return SampleFacts(name=name, compared=True, first_difference=first_difference(ours, theirs))
