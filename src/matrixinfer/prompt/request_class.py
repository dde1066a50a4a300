"""Sorts requests by what an engine may render differently, so that one kind can be distrusted without the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from matrixinfer.prompt.base import Chat

_APIS: Mapping[str, str] = MappingProxyType(
    {
        "/v1/chat/completions": "chat",
        "/v1/completions": "text",
        "/v1/messages": "messages",
        "/v1/responses": "responses",
    }
)
_OTHER_API = "pooling"


def request_class(path: str, chat: Chat | None) -> str:
    """The class of a request: its API and, in this order, `tools`, `reasoning`, `parts` and `other`, joined by `+`.

    There are at most 80. `tools` are definitions, calls or results; `reasoning` is an effort, a switch, any other variable
    of the template, or reasoning of earlier turns; `parts` are contents that are lists; `other` is the rest of what
    templates see: documents, messages to continue, developers, templates of the request.
    """
    api = _APIS.get(path, _OTHER_API)
    return api if chat is None else "+".join((api, *_features(chat)))


def _features(chat: Chat) -> Sequence[str]:
    tools, reasoning, parts, other = bool(chat.tools), False, False, False
    for message in chat.messages:
        if isinstance(message.get("content"), list):
            parts = True
        if len(message) == 2 and message.get("role") in ("user", "system", "assistant"):
            continue
        tools = tools or bool(message.get("tool_calls")) or message.get("role") == "tool"
        reasoning = reasoning or bool(message.get("reasoning") or message.get("reasoning_content"))
        other = other or message.get("role") == "developer" or "name" in message
    sent = chat.sent
    if (
        chat.chat_template_kwargs
        or chat.thinking_off
        or (sent is not None and (sent.reasoning or sent.reasoning_effort))
    ):
        reasoning = True
    if chat.documents or chat.own_template or chat.continue_final_message or not chat.add_generation_prompt:
        other = True
    if not (tools or reasoning or parts or other):
        return ()
    flags = {"tools": tools, "reasoning": reasoning, "parts": parts, "other": other}
    return [name for name, is_set in flags.items() if is_set]
