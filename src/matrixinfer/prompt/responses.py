"""Reads requests to the OpenAI API's `/v1/responses` into the chat that vLLM builds from their input items."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from msgspec import Raw, Struct
from msgspec.structs import replace

from matrixinfer.errors import TokenizeError
from matrixinfer.prompt import fields
from matrixinfer.prompt.base import Chat, Prompt

RESPONSES_PATH = "/v1/responses"


class _Reasoning(Struct):
    effort: str | None = None


class _Request(fields.Request, kw_only=True):
    input: Raw
    instructions: str | None = None
    tools: Raw = fields.NULL
    reasoning: _Reasoning | None = None
    previous_response_id: str | None = None
    previous_input_messages: Any = None
    chat_template_kwargs: fields.Object | None = None
    truncation: Any = None


_REQUEST = msgspec.json.Decoder(_Request)
_INPUT = msgspec.json.Decoder(str | list[fields.Object])

_CUSTOM_TOOL_PARAMETERS = {
    "type": "object",
    "properties": {"input": {"type": "string", "description": "The freeform text payload for this tool."}},
    "required": ["input"],
    "additionalProperties": False,
}
"""vLLM presents custom tools to a model as functions of one string, with this description."""

_UNFINISHED = ("in_progress", "incomplete")


def response(path: str, body: bytes) -> Prompt:
    """Read a request to `/v1/responses`. Raises `InvalidRequest`.

    Here vLLM lets the tokenizer add its special tokens even to rendered chats.
    """
    request = fields.decode(_REQUEST, body)
    items = fields.decode(_INPUT, request.input, "input")
    tools = fields.decode(fields.OBJECTS, request.tools, "tools")
    chat: Chat | None = None
    inexact: str | None = None
    if request.previous_response_id is not None or request.previous_input_messages is not None:
        inexact = "the engine stores the beginning of the conversation"
    else:
        try:
            chat = _chat(request, items, tools)
        except TokenizeError as error:
            inexact = str(error)
    prompt = fields.prompt(
        path,
        request,
        len(body),
        prefix=(bytes(request.tools) if tools else b"") + (request.instructions or "").encode() + bytes(request.input),
        chat=chat,
        add_special_tokens=True,
        inexact=inexact,
        counted=request.truncation != "auto",
    )
    return replace(prompt, response_id=request.previous_response_id) if request.previous_response_id else prompt


def _chat(request: _Request, items: str | list[fields.Object], tools: list[fields.Object] | None) -> Chat:
    messages: list[fields.Object] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(items, str):
        messages.append({"role": "user", "content": items})
    else:
        for item in items:
            _append(messages, item)
    if not messages:
        raise TokenizeError("there is no input")
    unfinished = isinstance(items, list) and bool(items) and _is_unfinished(items[-1])
    return Chat(
        messages=messages,
        tools=_tools(tools) if tools else None,
        add_generation_prompt=not unfinished,
        continue_final_message=unfinished,
        chat_template_kwargs=fields.template_variables(
            request.chat_template_kwargs, effort=None if request.reasoning is None else request.reasoning.effort
        ),
        in_schema_order=False,
    )


def _append(messages: list[fields.Object], item: fields.Object) -> None:
    """Append an item. The reasoning, text and tool calls of one assistant turn become one message.

    Raises `TokenizeError` for items that vLLM does not render.
    """
    kind, role = item.get("type"), item.get("role")
    if kind in ("function_call", "custom_tool_call"):
        _answer(messages, "tool_calls", _tool_call(item))
    elif kind == "reasoning":
        _answer(messages, "reasoning", _reasoning(item))
    elif kind in ("function_call_output", "custom_tool_call_output"):
        messages.append({"role": "tool", "content": item.get("output"), "tool_call_id": item.get("call_id")})
    elif role == "assistant" and (text := _first_text(item.get("content"))) is not None:
        _answer(messages, "content", text)
    elif isinstance(role, str):
        messages.append(item)
    else:
        raise TokenizeError("the engine does not render input items of this type")


def _answer(messages: list[fields.Object], key: str, value: object) -> None:
    """Add a field to the last assistant message if it lacks that field, else start another message."""
    last = messages[-1] if messages and messages[-1].get("role") == "assistant" else None
    if key == "tool_calls" and last is not None:
        before = last.get(key)
        last[key] = [*before, value] if isinstance(before, list) else [value]
    elif last is not None and last.get(key) is None:
        last[key] = value
    else:
        messages.append({"role": "assistant", key: [value] if key == "tool_calls" else value})


def _first_text(content: object) -> str | None:
    """An assistant message's text: vLLM uses only the first part."""
    if isinstance(content, list):
        content = content[0].get("text") if content and isinstance(content[0], dict) else None
    return content if isinstance(content, str) else None


def _tool_call(item: fields.Object) -> fields.Object:
    name, arguments = item.get("name"), item.get("arguments")
    if item["type"] == "custom_tool_call":
        arguments = json.dumps({"input": item.get("input") or ""}, ensure_ascii=False)
    elif item.get("namespace"):
        name = f"{item['namespace']}__{name}"
    return {"id": item.get("call_id"), "function": {"name": name, "arguments": arguments}, "type": "function"}


def _reasoning(item: fields.Object) -> str:
    if item.get("encrypted_content"):
        raise TokenizeError("the reasoning is encrypted")
    texts = (_first_text(item.get(key)) for key in ("content", "summary"))
    return next((text for text in texts if text is not None), "")


def _is_unfinished(item: fields.Object) -> bool:
    return item.get("type", "message") in ("message", "reasoning") and item.get("status") in _UNFINISHED


def _tools(tools: list[fields.Object]) -> list[fields.Object]:
    """The tools that the model sees: functions, functions in namespaces, and custom tools. Others run in the engine."""
    shown: list[fields.Object] = []
    for tool in tools:
        match tool.get("type"):
            case "function":
                shown.append(tool)
            case "custom":
                shown.append({key: tool.get(key) for key in ("name", "description")})
                shown[-1]["parameters"] = _CUSTOM_TOOL_PARAMETERS
            case "namespace" if isinstance(tool.get("tools"), list):
                shown += [
                    {**each, "name": f"{tool.get('name')}__{each.get('name')}"}
                    for each in tool["tools"]
                    if isinstance(each, dict) and each.get("type") == "function"
                ]
    return [{"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}} for tool in shown]
