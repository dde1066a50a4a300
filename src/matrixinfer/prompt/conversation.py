"""A chat as vLLM hands it to the chat template.

Clients send the OpenAI form; vLLM reshapes it before the template sees it, and so the ids that it caches are those of
the reshaped chat: content becomes one string or a list of text parts, tool-call arguments become objects, tool
definitions get their keys in a fixed order. The rules are those of vLLM's `chat_utils` and request schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from matrixinfer.errors import TokenizeError

_TEXT_KEYS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
"""Types of content parts that are text, and the key that holds it."""

_BILLING_HEADER = "x-anthropic-billing-header"
"""How a line begins that Claude Code puts first, different in every request; vLLM drops it from system messages."""


def has_media(messages: Sequence[Mapping[str, Any]]) -> bool:
    """True when some message carries anything but text: the engine alone knows its token ids."""
    contents = (message.get("content") for message in messages)
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return not all(isinstance(part, str) or (isinstance(part, dict) and _is_text(part)) for part in parts)


def engine_messages(messages: Sequence[Mapping[str, Any]], *, parts: bool) -> list[dict[str, Any]]:
    """The messages as the template gets them: content as a list of parts, or joined to one string.

    Raises `TokenizeError` for content that is not text.
    """
    return [_message(message, parts=parts) for message in messages]


def without_developers(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Engine messages for a template that does not know the role `developer`.

    Developers become system messages, and those are put together in one, which comes first.
    """
    if all(message["role"] != "developer" for message in messages):
        return messages
    messages = [_as_system(message) if message["role"] == "developer" else message for message in messages]
    if all(message["role"] != "system" for message in messages[1:]):
        return messages
    texts = [_joined(message["content"]) for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(filter(None, texts))}, *others]


def engine_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Tool definitions with their keys in vLLM's order; a missing description or schema is null."""
    return None if tools is None else [_tool(tool) for tool in tools]


def _message(message: Mapping[str, Any], *, parts: bool) -> dict[str, Any]:
    role = message.get("role")
    texts = _texts(message.get("content"))
    if role == "system":
        texts = _without_billing(texts)
    # Tool results are one string whatever the template: few templates expect parts there.
    listed = parts and role != "tool"
    content: object = [{"type": "text", "text": text} for text in texts] if listed else "\n".join(texts)
    shaped: dict[str, Any] = {"role": role, "content": content}
    if role == "assistant":
        calls = message.get("tool_calls")
        if isinstance(calls, list) and calls:
            shaped["tool_calls"] = [_tool_call(call) for call in calls]
        reasoning = message.get("reasoning")
        if reasoning is None:
            reasoning = message.get("reasoning_content")
        if reasoning is not None:
            shaped |= {"reasoning": reasoning, "reasoning_content": reasoning}
    elif role == "tool" and "tool_call_id" in message:
        shaped["tool_call_id"] = message["tool_call_id"]
    elif role == "developer":
        shaped["tools"] = message.get("tools")
    shaped |= {key: message[key] for key in ("name", "task") if isinstance(message.get(key), str)}
    return shaped


def _as_system(developer: Mapping[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in developer.items() if key != "tools"}, "role": "system"}


def _joined(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _without_billing(texts: Sequence[str]) -> list[str]:
    """The texts without header lines; a text that is nothing else goes as a whole."""
    rests = [text.partition("\n")[2] or None if text.startswith(_BILLING_HEADER) else text for text in texts]
    return [text for text in rests if text is not None]


def _texts(content: object) -> list[str]:
    match content:
        case None:
            return []
        case str():
            return [content]
        case list():
            return [text for part in content if (text := _text(part)) is not None]
        case _:
            raise TokenizeError("a message's content is neither text nor a list of parts")


def _text(part: object) -> str | None:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or not _is_text(part):
        raise TokenizeError("a message carries content that is not text")
    text = part.get(_TEXT_KEYS[part.get("type", "text")])
    return text if isinstance(text, str) else None


def _is_text(part: Mapping[str, Any]) -> bool:
    kind = part.get("type", "text" if "text" in part else None)
    return isinstance(kind, str) and kind in _TEXT_KEYS


def _tool_call(call: object) -> dict[str, Any]:
    """Keys in the order of vLLM's schema, unknown ones last. Arguments that are no JSON object become an empty one."""
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        raise TokenizeError("a tool call has no function")
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    shaped = {"arguments": None, "name": None} | function
    shaped["arguments"] = arguments if isinstance(arguments, dict) else {}
    ordered = {key: call[key] for key in ("id", "function", "type") if key in call}
    return ordered | call | {"function": shaped}


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    if not isinstance(function, dict):
        raise TokenizeError("a tool has no function")
    shaped = {key: function.get(key) for key in ("name", "description", "parameters")}
    shaped |= {key: function[key] for key in ("strict", "defer_loading") if function.get(key) is not None}
    return {"type": tool.get("type", "function"), "function": shaped}
