"""Reads requests of Anthropic's Messages API into the chat that vLLM builds from them."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct

from matrixinfer.errors import TokenizeError
from matrixinfer.prompt import fields
from matrixinfer.prompt.base import Chat, Prompt
from matrixinfer.prompt.conversation import BILLING_HEADER

MESSAGES_PATH = "/v1/messages"
COUNT_PATH = "/v1/messages/count_tokens"


class _Definition(Struct):
    name: str
    description: str | None = None
    input_schema: fields.Object | None = None
    strict: bool | None = None
    defer_loading: bool | None = None


class _Change(Struct):
    name: str | None = None
    definition: _Definition | None = None


class _Block(Struct):
    type: str
    text: str | None = None
    source: fields.Object | None = None
    id: str | None = None
    tool_use_id: str | None = None
    name: str | None = None
    input: fields.Object | None = None
    content: str | list[fields.Object] | None = None
    thinking: str | None = None
    tool: _Change | None = None


class _Message(Struct):
    role: str
    content: str | list[_Block]

    @property
    def blocks(self) -> list[_Block]:
        """The content as blocks; plain text becomes one text block."""
        return [_Block(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class _Thinking(Struct):
    type: str | None = None


class _Output(Struct):
    effort: str | None = None


class _Request(fields.Request, kw_only=True):
    messages: Raw
    system: str | list[_Block] | None = None
    tools: Raw = fields.NULL
    thinking: _Thinking | None = None
    output_config: _Output | None = None
    chat_template_kwargs: fields.Object | None = None

    @property
    def system_text(self) -> str:
        """The system prompt without the billing line, which differs in every request."""
        return self.system if isinstance(self.system, str) else _system_text(self.system or [])


_REQUEST = msgspec.json.Decoder(_Request)
_MESSAGES = msgspec.json.Decoder(Annotated[list[_Message], Meta(min_length=1)])
_TOOLS = msgspec.json.Decoder(list[_Definition] | None)


def message(path: str, body: bytes) -> Prompt:
    """Read a request to `/v1/messages`. Raises `InvalidRequest`."""
    request = fields.decode(_REQUEST, body)
    sent = fields.decode(_MESSAGES, request.messages, "messages")
    tools = fields.decode(_TOOLS, request.tools, "tools")
    chat: Chat | None = None
    inexact: str | None = None
    try:
        chat = _chat(request, sent, tools)
    except TokenizeError as error:
        inexact = str(error)
    return fields.prompt(
        path,
        request,
        len(body),
        prefix=(bytes(request.tools) if tools else b"") + request.system_text.encode() + bytes(request.messages),
        chat=chat,
        add_special_tokens=False,
        inexact=inexact,
    )


def count(path: str, body: bytes) -> Prompt:
    """Read a request to `/v1/messages/count_tokens`, which any engine of the model can answer. Raises `InvalidRequest`."""
    return fields.prompt(
        path,
        fields.decode(_REQUEST, body),
        len(body),
        prefix=b"",
        add_special_tokens=False,
        inexact="the request only counts tokens; the engine computes nothing",
    )


def _chat(request: _Request, sent: list[_Message], tools: list[_Definition] | None) -> Chat:
    messages: list[fields.Object] = []
    if system := request.system_text:
        messages.append({"role": "system", "content": system})
    for each in sent:
        if each.role == "system":
            if text := _system_text(each.blocks):
                messages.append({"role": "system", "content": text})
        elif isinstance(each.content, str):
            messages.append({"role": each.role, "content": each.content})
        else:
            _append(messages, each.role, each.content)
    if not messages:
        raise TokenizeError("the messages are empty")
    off = request.thinking is not None and request.thinking.type == "disabled"
    if off and "enable_thinking" in (request.chat_template_kwargs or {}):
        raise TokenizeError("`thinking` and `chat_template_kwargs.enable_thinking` are both set")
    effort = None if request.output_config is None else request.output_config.effort
    return Chat(
        messages=messages,
        tools=_tools(tools, sent),
        chat_template_kwargs=fields.template_variables(request.chat_template_kwargs, effort="none" if off else effort),
        joins_system=any(message["role"] == "system" for message in messages[1:]),
        thinking_off=off,
    )


def _system_text(blocks: list[_Block]) -> str:
    texts = [block.text for block in blocks if block.type == "text" and block.text]
    return "".join(text for text in texts if not text.startswith(BILLING_HEADER))


def _append(messages: list[fields.Object], role: str, blocks: list[_Block]) -> None:
    """Append a message made of blocks. Tool results become separate messages before the rest of a user's message."""
    parts: list[fields.Object] = []
    calls: list[fields.Object] = []
    reasoning: list[str] = []
    for block in blocks:
        match block.type:
            case "text" if block.text:
                parts.append({"type": "text", "text": block.text})
            case "image" if block.source:
                parts.append(_image())
            case "thinking" if block.thinking is not None:
                reasoning.append(block.thinking)
            case "tool_use":
                calls.append(_tool_call(block))
            case "tool_result" if role == "user":
                messages += _tool_result(block)
            case "tool_result":
                parts.append({"type": "text", "text": f"Tool result: {block.content or ''}"})
    shaped: fields.Object = {"role": role}
    if reasoning:
        shaped["reasoning"] = "".join(reasoning)
    if calls:
        shaped["tool_calls"] = calls
    if parts:
        alone = len(parts) == 1 and parts[0]["type"] == "text"
        shaped["content"] = parts[0]["text"] if alone else parts
    if role != "user" or parts:
        messages.append(shaped)


def _image() -> fields.Object:
    """A placeholder for an image. Only its position matters: the engine alone knows its token ids."""
    return {"type": "image_url", "image_url": {}}


def _tool_call(block: _Block) -> fields.Object:
    if not block.id:
        raise TokenizeError("a tool call has no id; the engine generates one")
    arguments = msgspec.json.encode(block.input or {}).decode()
    return {"id": block.id, "type": "function", "function": {"name": block.name or "", "arguments": arguments}}


def _tool_result(block: _Block) -> list[fields.Object]:
    """The messages of a tool's result: its text, then its images, then the tools that it references."""
    items = block.content if isinstance(block.content, list) else []
    text = "\n".join(str(item.get("text", "")) for item in items if item.get("type") == "text")
    result = {"role": "tool", "tool_call_id": block.tool_use_id or ""}
    messages: list[fields.Object] = [{**result, "content": block.content if isinstance(block.content, str) else text}]
    images = [_image() for item in items if item.get("type") == "image"]
    if images:
        messages.append({"role": "user", "content": images})
    names = [item.get("tool_name") or item.get("name") for item in items if item.get("type") == "tool_reference"]
    if references := [{"type": "tool_reference", "name": name} for name in names if name]:
        messages.append({**result, "content": references})
    return messages


def _tools(tools: list[_Definition] | None, sent: list[_Message]) -> list[fields.Object] | None:
    """The tools in effect at the end of the conversation: system messages may add and remove tools."""
    changes = [
        block
        for each in sent
        if each.role == "system"
        for block in each.blocks
        if block.type in ("tool_addition", "tool_removal") and block.tool is not None
    ]
    if tools is None and not changes:
        return None
    if not changes:
        return [_tool(tool) for tool in tools or []]
    known = {tool.name: tool for tool in tools or []}
    removed: set[str] = set()
    for block in changes:
        change = block.tool or _Change()
        name = change.name or ""
        if change.definition is not None:
            name = change.definition.name
            known[name] = change.definition
        elif name not in known:
            raise TokenizeError("a message adds or removes a tool that the request does not declare")
        elif block.type == "tool_addition":
            known[name] = msgspec.structs.replace(known[name], defer_loading=None)
        if block.type == "tool_removal":
            removed.add(name)
        else:
            removed.discard(name)
    return [_tool(tool) for name, tool in known.items() if name not in removed]


def _tool(tool: _Definition) -> fields.Object:
    schema = tool.input_schema
    if schema is None:
        raise TokenizeError("a tool has no schema; it is built into the engine")
    return {
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.description,
            "parameters": {**schema, "type": schema.get("type", "object")},
            "strict": tool.strict,
            "defer_loading": tool.defer_loading,
        },
    }
