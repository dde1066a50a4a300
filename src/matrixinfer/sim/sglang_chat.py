"""Reshapes a chat as SGLang 0.5.23 does before it renders the chat template.

It differs from vLLM: tools keep the client's order of keys and get nulls for what is missing, parts of a message are
joined by spaces, and a final message of the assistant becomes the user's unless it is continued.
"""

from __future__ import annotations

from typing import Any

import msgspec

from matrixinfer.errors import UNREADABLE, InvalidRequest
from matrixinfer.prompt.base import Chat
from matrixinfer.prompt.dialect import Dialect
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.api import Json
from matrixinfer.sim.sglang_api import Options, TokenizeRequest

_FUNCTION_FIELDS = ("description", "name", "parameters", "strict", "defer_loading")
_OPTIONAL_FIELDS = ("strict", "defer_loading")


def render(tokenizer: LocalTokenizer, chat: Options | TokenizeRequest) -> tuple[str, str]:
    """The chat's text, and the text of a final message that the engine continues. Raises `RequestError`, `TokenizeError`."""
    tools = _tools(chat.tools, chat.tool_choice)
    template = tokenizer.template_of(Chat(messages=chat.messages or [], tools=tools))
    messages = [_message(message, parts=template.takes_parts(Dialect.SGLANG)) for message in chat.messages or []]
    as_given = chat.add_generation_prompt if isinstance(chat, TokenizeRequest) else None
    continued = ""
    if as_given is None or chat.continue_final_message:
        messages, continued = _open_final(messages, continues=chat.continue_final_message)
    effort = {} if chat.reasoning_effort is None else {"reasoning_effort": chat.reasoning_effort}
    variables = effort | (chat.chat_template_kwargs or {})
    text = template.render(messages, tools, None, add_generation_prompt=as_given is not False, **variables)
    return text, continued


def _tools(tools: list[Json] | None, choice: Any) -> list[Json] | None:
    if not tools or choice == "none":
        return None
    if isinstance(choice, dict):
        name = choice.get("function", {}).get("name")
        tools = [tool for tool in tools if tool["function"]["name"] == name]
    return [_tool(tool) for tool in tools] or None


def _tool(tool: Json) -> Json:
    """A tool's fields in the order of SGLang's schema, its function's in the client's."""
    sent, defer = tool.get("function", {}), tool.get("defer_loading")
    function = dict.fromkeys(_FUNCTION_FIELDS) | {key: sent[key] for key in sent if key in _FUNCTION_FIELDS}
    if function["defer_loading"] is None:
        function["defer_loading"] = defer
    kept = [key for key in (*sent, *_FUNCTION_FIELDS) if key in function]
    shaped = {key: function[key] for key in kept if not (key in _OPTIONAL_FIELDS and function[key] is None)}
    return {"type": tool.get("type", "function"), "function": shaped, "defer_loading": defer}


def _message(message: Json, *, parts: bool) -> Json:
    """A message without nulls, its content text unless the template takes parts, and its tool arguments parsed."""
    shaped = {key: value for key, value in message.items() if value is not None}
    content = shaped.setdefault("content", "")
    if isinstance(content, list):
        texts = [part for part in content if part.get("type") in ("text", "input_text")]
        if parts and message.get("role") != "tool":
            shaped["content"] = [part | {"type": "text"} for part in texts]
        else:
            shaped["content"] = " ".join(part["text"] for part in texts)
    if isinstance(calls := shaped.get("tool_calls"), list):
        shaped["tool_calls"] = [call | {"function": _parsed(call["function"])} for call in calls]
    return shaped


def _parsed(function: Json) -> Json:
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return function
    try:
        return function | {"arguments": msgspec.json.decode(arguments, type=dict[str, Any])}
    except UNREADABLE as error:
        raise InvalidRequest("expected a JSON object in `arguments` of a tool call", param="messages") from error


def _open_final(messages: list[Json], *, continues: bool) -> tuple[list[Json], str]:
    """Take a final message of the assistant out of `messages` to continue it, or make it the user's."""
    if not messages or messages[-1].get("role") != "assistant" or not isinstance(messages[-1]["content"], str):
        return messages, ""
    *before, last = messages
    if continues:
        return before, last["content"]
    return [*before, {"role": "user", "content": last["content"]}], ""
