"""Reshapes a chat as vLLM does before it renders the chat template.

Clients send the OpenAI form. vLLM reshapes it before the template sees it, so the ids that it caches are those of the
reshaped chat: content becomes one string or a list of text parts, tool-call arguments become objects, and the keys of
tool calls and tool definitions get a fixed order. The rules are those of `chat_utils` and the request schema in vLLM
0.32. A chat that vLLM refuses may yield any result or raise `TokenizeError`: no engine computes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matrixinfer.errors import TokenizeError

_TEXT_KEYS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
"""The types of text parts, and the key that holds the text."""

_KNOWN_PART_KEYS = frozenset(
    {
        *(
            "audio_embeds",
            "audio_url",
            "closed",
            "data",
            "file",
            "image_embeds",
            "image_pil",
            "image_url",
            "input_audio",
        ),
        *(
            "name",
            "prompt_cache_breakpoint",
            "refusal",
            "text",
            "thinking",
            "type",
            "uuid",
            "video_embeds",
            "video_url",
        ),
    }
)
"""Keys of content parts that vLLM knows. Templates that take parts also get the unknown keys of text parts."""

BILLING_HEADER = "x-anthropic-billing-header"
"""Start of the line that Claude Code puts first and that differs in every request; vLLM drops it from system messages."""


def has_media(messages: Iterable[Mapping[str, Any]]) -> bool:
    """True when a message contains anything but text: only the engine knows the token ids of that."""
    return any(is_media(part) for message in messages for part in _listed(message))


def is_media(part: object) -> bool:
    """True when a content part is not text: an image, audio, video or an unknown type."""
    return not isinstance(part, str) and not (isinstance(part, dict) and (_is_text(part) or _is_reference(part)))


def engine_messages(
    messages: Iterable[Mapping[str, Any]], *, parts: bool, in_schema_order: bool = True
) -> list[dict[str, Any]]:
    """The messages as the template gets them: content as a list of parts if `parts`, else joined into one string.

    `in_schema_order` is `Chat.in_schema_order`. Raises `TokenizeError` for content that is not text.
    """
    return [_message(message, parts=parts, in_schema_order=in_schema_order) for message in messages]


def without_developers(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Engine messages for a template that does not know the role `developer`.

    Developer messages become system messages, and all system messages are merged into one at the front. A message that was
    sent without a role may have none.
    """
    if all(message.get("role") != "developer" for message in messages):
        return messages
    messages = [_as_system(message) if message.get("role") == "developer" else message for message in messages]
    if all(message.get("role") != "system" for message in messages[1:]):
        return messages
    texts = [_joined(message["content"]) for message in messages if message.get("role") == "system"]
    others = [message for message in messages if message.get("role") != "system"]
    return [{"role": "system", "content": "\n\n".join(filter(None, texts))}, *others]


def engine_tools(tools: Iterable[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Tool definitions with keys in vLLM's order; a missing description or schema becomes null."""
    return None if tools is None else [_tool(tool) for tool in tools]


def _message(message: Mapping[str, Any], *, parts: bool, in_schema_order: bool) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if isinstance(content, str) and not (role == "system" and content.startswith(BILLING_HEADER)):
        listed = parts and role != "tool"
        shaped: dict[str, Any] = {"role": role, "content": [{"type": "text", "text": content}] if listed else content}
        if len(message) == 2 and role != "developer":
            return shaped
    else:
        shaped = {"role": role, "content": _content(role, content, parts=parts)}
    if role == "assistant":
        shaped |= _assistant(message, in_schema_order=in_schema_order)
    elif role == "tool" and "tool_call_id" in message:
        shaped["tool_call_id"] = message["tool_call_id"]
    shaped |= {key: message[key] for key in ("name", "task") if isinstance(message.get(key), str)}
    if role == "developer":
        shaped["tools"] = _developer_tools(message.get("tools"))
    return shaped


def _content(role: object, content: object, *, parts: bool) -> str | list[dict[str, Any]]:
    sent = [content] if isinstance(content, str) else [] if content is None else content
    if not isinstance(sent, list):
        raise TokenizeError("a message's content is neither text nor a list of parts")
    if role == "system":
        sent = [rest for part in sent if (rest := _without_billing(part)) is not None]
    shaped = [shape for part in sent if (shape := _part(part)) is not None]
    # Tool results are one string for every template: few templates expect parts there.
    if parts and not (role == "tool" and all(part["type"] == "text" for part in shaped)):
        return shaped
    texts = [part["text"] if part["type"] == "text" else part["name"] for part in shaped]
    return "\n".join(texts if parts else filter(None, texts))


def _part(part: object) -> dict[str, Any] | None:
    """A content part as templates that take parts get it, or None if it is dropped."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, dict) and _is_text(part):
        text = part.get(_TEXT_KEYS[part["type"]])
        if text is None:
            return None
        if isinstance(text, str):
            return {"type": "text", "text": text} | {key: part[key] for key in part if key not in _KNOWN_PART_KEYS}
    elif isinstance(part, dict) and _is_reference(part):
        return {"type": "tool_reference", "name": part["name"]}
    raise TokenizeError("a message contains content that is not text")


def _is_text(part: Mapping[str, Any]) -> bool:
    kind = part.get("type")
    return isinstance(kind, str) and kind in _TEXT_KEYS and part.get("uuid") is None


def _is_reference(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "tool_reference" and isinstance(part.get("name"), str) and part.get("uuid") is None


def _without_billing(part: object) -> object | None:
    """The part without the billing line, or None if nothing else is left."""
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
    if not isinstance(text, str) or not text.startswith(BILLING_HEADER):
        return part
    rest = text.partition("\n")[2]
    if not rest:
        return None
    return {**part, "text": rest} if isinstance(part, dict) else rest


def _assistant(message: Mapping[str, Any], *, in_schema_order: bool) -> dict[str, Any]:
    """The fields of an assistant message besides role and content."""
    shaped: dict[str, Any] = {}
    calls = message.get("tool_calls")
    if calls:
        if not isinstance(calls, list):
            raise TokenizeError("a message's tool calls are not a list")
        shaped["tool_calls"] = [_tool_call(call, in_schema_order=in_schema_order) for call in calls]
    reasoning = message.get("reasoning")
    if reasoning is None:
        reasoning = message.get("reasoning_content")
    if reasoning is not None:
        shaped |= {"reasoning": reasoning, "reasoning_content": reasoning}
    return shaped


def _tool_call(call: object, *, in_schema_order: bool) -> dict[str, Any]:
    """Keys in the order of vLLM's schema, unknown ones last. Arguments that are not a JSON object become `{}`."""
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        raise TokenizeError("a tool call has no function")
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    given = {"arguments": arguments if isinstance(arguments, dict) else {}}
    if not in_schema_order:
        return call | {"function": function | given}
    return _ordered(call | {"function": _ordered(function | given, "arguments", "name")}, "id", "function", "type")


def _developer_tools(tools: object) -> object:
    """The tools of a developer message: only their keys are reordered."""
    if not isinstance(tools, list) or not all(
        isinstance(tool, dict) and isinstance(tool.get("function"), dict) for tool in tools
    ):
        return tools
    keys = ("name", "description", "parameters", "strict")
    return [_ordered(tool | {"function": _ordered(tool["function"], *keys)}, "function", "type") for tool in tools]


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function, deferred = tool.get("function"), tool.get("defer_loading")
    if not isinstance(function, dict):
        raise TokenizeError("a tool has no function")
    shaped = {key: function.get(key) for key in ("name", "description", "parameters")}
    optional = {"strict": function.get("strict"), "defer_loading": function.get("defer_loading")}
    if optional["defer_loading"] is None:
        optional["defer_loading"] = deferred
    shaped |= {key: value for key, value in optional.items() if value is not None}
    whole = {"type": tool.get("type", "function"), "function": shaped}
    return whole if deferred is None else whole | {"defer_loading": deferred}


def _ordered(fields: Mapping[str, Any], *first: str) -> dict[str, Any]:
    """The fields, with those of the keys `first` that exist moved to the front."""
    return {**{key: fields[key] for key in first if key in fields}, **fields}


def _as_system(developer: Mapping[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in developer.items() if key != "tools"}, "role": "system"}


def _joined(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content if "text" in part)


def _listed(message: Mapping[str, Any]) -> Sequence[object]:
    content = message.get("content")
    return content if isinstance(content, list) else ()
