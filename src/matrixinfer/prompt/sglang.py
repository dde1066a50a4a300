"""Reshapes a chat as SGLang does before it renders the chat template, where that differs from vLLM.

The rules are those of the chat API of SGLang 0.5.18 to 0.5.23. A chat that SGLang refuses may yield any result or raise
`TokenizeError`: no engine computes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from matrixinfer.errors import TokenizeError
from matrixinfer.prompt.base import Chat, SentFields
from matrixinfer.prompt.dialect import Dialect
from matrixinfer.prompt.grown import Grown

_EFFORTS = frozenset({"none", "minimal", "low", "medium", "high", "xhigh", "ultra", "max"})
_TRUE = frozenset({"1", "true", "yes", "y", "on"})
_FIELDS = ("role", "content", "tool_call_id", "name", "phase", "reasoning_content", "tool_calls", "tools", "prefix")
"""The fields of a message, in the order in which the template gets them. Users' messages have only the first two."""
_SET_BY_ENGINE = frozenset({"add_generation_prompt", "chat_template", "continue_final_message", "messages", "tools"})
"""Template variables with which SGLang refuses a request, or renders something else than the request's chat."""
_SCHEMA_TYPES = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})
"""SGLang rewrites other types in the schemas of tools, such as `varchar`."""
_DICTIONARIES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = (
    *("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"),
    *("unevaluatedItems", "unevaluatedProperties"),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SglangChat:
    """The arguments with which SGLang renders a chat's template."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]
    continued: str
    """The text of the assistant's message to continue, which is encoded separately; empty if there is none."""


def sglang_chat(chat: Chat, dialect: Dialect, grown: Grown | None = None, *, parts: bool) -> SglangChat:
    """What the template gets; content is a list of parts if `parts`. Raises `TokenizeError`.

    `grown` has the messages that were shaped before.
    """
    if dialect is Dialect.SGLANG_OLD:
        raise TokenizeError("how SGLang before 0.5.18 renders chats is not known here")
    if chat.sent is None:
        raise TokenizeError("how SGLang renders chats of this API is not known here")
    messages = list((grown or Grown(chat, dialect)).messages(partial(_shaped_messages, parts=parts)))
    continued = ""
    last = messages[-1]
    if last["role"] == "assistant" and isinstance(last["content"], str):
        # SGLang takes an assistant's message at the end for the user's, unless it is to be continued.
        messages[-1:] = [] if chat.continue_final_message else [{"role": "user", "content": last["content"]}]
        continued = last["content"] if chat.continue_final_message else ""
    return SglangChat(
        messages=messages,
        tools=_tools(chat, dialect),
        variables=_variables(chat.sent),
        continued=continued,
    )


def without_wrappers(tools: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The bare functions: SGLang's second attempt when the template fails with the tools as they are."""
    return [tool["function"] for tool in tools]


def _shaped_messages(messages: Iterable[Mapping[str, Any]], *, parts: bool) -> list[dict[str, Any]]:
    return [_shaped(_message(message), parts=parts) for message in messages]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with the fields that SGLang knows, in its order; those that were not sent are null."""
    role = message.get("role")
    if role == "user":
        return {"role": "user", "content": message.get("content")}
    if not isinstance(role, str):
        raise TokenizeError("a message has no role")
    role = role.lower()
    shaped = {**{key: message.get(key) for key in _FIELDS}, "role": role}
    if (calls := shaped["tool_calls"]) is not None:
        if not isinstance(calls, list):
            raise TokenizeError("a message's tool calls are not a list")
        shaped["tool_calls"] = [_tool_call(call, parses=role == "assistant") for call in calls]
    if shaped["tools"] is not None:
        raise TokenizeError("a message brings tools along")
    return shaped


def _tool_call(call: object, *, parses: bool) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise TokenizeError("a tool call has no function")
    arguments = function.get("arguments")
    if parses and isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise TokenizeError("the arguments of a tool call are not a JSON object") from error
    return {
        "id": call.get("id"),
        "index": call.get("index"),
        "type": call.get("type", "function"),
        "function": {"name": function.get("name"), "arguments": arguments},
    }


def _shaped(message: dict[str, Any], *, parts: bool) -> dict[str, Any]:
    """The message without nulls, its content as the template gets it."""
    content = message["content"]
    if isinstance(content, list):
        texts = [shape for part in content if (shape := _part(part)) is not None]
        if parts:
            if message["role"] == "tool" and all(part["type"] == "text" for part in texts):
                content = " ".join(part["text"] for part in texts)
            else:
                content = texts
            # With parts, SGLang puts the content behind the other fields.
            message = {**{key: value for key, value in message.items() if key != "content"}, "content": content}
        else:
            message["content"] = " ".join(part["text"] for part in texts if part["type"] == "text")
    elif content is None:
        message["content"] = ""
    elif not isinstance(content, str):
        raise TokenizeError("a message's content is neither text nor a list of parts")
    return {key: value for key, value in message.items() if value is not None}


def _part(part: object) -> dict[str, Any] | None:
    """A content part, or None if it is dropped."""
    match part:
        case {"type": "text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "tool_reference", "name": str(name)}:
            return {"type": "tool_reference", "name": name}
        case {"type": "thinking" | "reasoning"}:
            return None
        case _:
            raise TokenizeError("a message contains content that is not text")


def _variables(sent: SentFields) -> dict[str, Any]:
    """The template's variables: those that were sent, and the reasoning effort, which also sets two switches."""
    variables = dict(sent.template_kwargs or {})
    if not _SET_BY_ENGINE.isdisjoint(variables):
        raise TokenizeError("`chat_template_kwargs` overrides variables that the engine sets")
    effort, thinking = _effort(sent)
    if thinking is not None:
        variables.setdefault("thinking", thinking)
        variables.setdefault("enable_thinking", thinking)
    own = variables.pop("reasoning_effort", None)
    effort = effort if own is None else own
    return variables if effort is None else {"reasoning_effort": effort, **variables}


def _effort(sent: SentFields) -> tuple[object, bool | None]:
    """The reasoning effort, and whether it or the field `reasoning` turns thinking on or off."""
    effort: object = sent.reasoning_effort
    thinking = None
    if isinstance(sent.reasoning, dict):
        named = sent.reasoning.get("effort")
        named = sent.reasoning.get("reasoning_effort") if named is None else named
        effort = effort if named is None else named
        enabled = sent.reasoning.get("enabled")
        enabled = sent.reasoning.get("enable", False) if enabled is None else enabled
        if enabled.strip().lower() in _TRUE if isinstance(enabled, str) else enabled:
            thinking = True
    if effort is None:
        return None, thinking
    if isinstance(effort, str) and effort in _EFFORTS:
        return effort, effort != "none"
    if isinstance(effort, bool) or not isinstance(effort, str | int | float):
        raise TokenizeError("SGLang refuses this reasoning effort")
    try:
        return float(effort), True
    except ValueError as error:
        raise TokenizeError("SGLang refuses this reasoning effort") from error


def _tools(chat: Chat, dialect: Dialect) -> list[dict[str, Any]] | None:
    """The tools that the template gets: those that `tool_choice` leaves."""
    choice = None if chat.sent is None else chat.sent.tool_choice
    if not chat.tools or choice == "none":
        return None
    tools = chat.tools
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        tools = [
            tool for tool in tools if isinstance(tool.get("function"), dict) and tool["function"].get("name") == name
        ]
    return [_tool(tool, dialect) for tool in tools] or None


def _tool(tool: Mapping[str, Any], dialect: Dialect) -> dict[str, Any]:
    function = tool.get("function")
    if not isinstance(function, dict):
        raise TokenizeError("a tool has no function")
    if not _is_standard(function.get("parameters")):
        raise TokenizeError("SGLang rewrites the types in a tool's schema")
    if dialect is Dialect.SGLANG_UNKNOWN:
        raise TokenizeError("SGLang's version is not known, and it decides in which form tools reach the template")
    return {
        "type": tool.get("type", "function"),
        "function": _function(function, tool.get("defer_loading"), sent_order=dialect is Dialect.SGLANG),
        "defer_loading": tool.get("defer_loading"),
    }


def _function(function: Mapping[str, Any], deferred: object, *, sent_order: bool) -> dict[str, Any]:
    """A tool's function: in the client's order since 0.5.23, before that in the order of the schema."""
    fields = {key: function.get(key) for key in ("description", "name", "parameters", "strict", "defer_loading")}
    if fields["defer_loading"] is None:
        fields["defer_loading"] = deferred
    if fields["defer_loading"] is None:
        del fields["defer_loading"]
    if not sent_order:
        return {**fields, "strict": bool(fields["strict"])}
    if fields["strict"] is None:
        del fields["strict"]
    return {**{key: fields[key] for key in function if key in fields}, **fields}


def _is_standard(schema: object) -> bool:
    """Whether all types that SGLang looks at in a JSON schema are standard ones, which it leaves as they are."""
    if isinstance(schema, list):
        return all(map(_is_standard, schema))
    if not isinstance(schema, dict):
        return True
    kind = schema.get("type", "object")
    kinds: Sequence[object] = kind if isinstance(kind, list) else (kind,)
    if not all(isinstance(each, str) and each in _SCHEMA_TYPES for each in kinds):
        return False
    below: list[object] = [schema[key] for key in _SCHEMAS if key in schema]
    for key in (*_DICTIONARIES, *_LISTS):
        nested = schema.get(key)
        if isinstance(nested, dict) and key in _DICTIONARIES:
            below += nested.values()
        elif isinstance(nested, list) and key in _LISTS:
            below += nested
    return all(map(_is_standard, below))
