"""What was made of a conversation so far, so that only its new messages are shaped and rendered.

`read_chats` gives a chat that continues another one the very same messages, and what was made of them (`Chat.rendered`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from matrixinfer.prompt.base import Chat
from matrixinfer.prompt.resuming import Kept, Rendering, begins_with

_MAX_MADE = 4
"""How many templates and engines a conversation is remembered for."""
_MAX_VARIABLES = 1000
"""Values and characters in a request's variables and documents: `ReadChats` does not count the memory of these."""

Shaped = list[dict[str, Any]]
Sent = Sequence[Mapping[str, Any]]


class _Made(NamedTuple):
    messages: Sent
    is_text: bool
    """Whether there were no media in them."""
    shaped: Shaped
    tools: Sent | None
    shaped_tools: Shaped | None
    loops: dict[int, Kept]


_NOTHING = _Made((), True, [], None, None, {})


class Grown:
    """What is made of a chat with one template for one kind of engine, which `key` names.

    Starts with what was made of the chats that it continues, and is kept for those that continue it.
    """

    def __init__(self, chat: Chat, *key: Hashable, is_text: bool = True) -> None:
        self._chat = chat
        self._is_text = is_text
        self._key = key
        made = _NOTHING if chat.rendered is None else chat.rendered.get(key, _NOTHING)
        self._made: _Made = made if begins_with(chat.messages, made.messages) else _NOTHING
        self._shaped: Shaped = []
        self._tools: Shaped | None = None

    def messages(self, shape: Callable[[Sent], Shaped]) -> Shaped:
        """The shaped messages; `shape` shapes each by itself."""
        self._shaped = [*self._made.shaped, *shape(self._chat.messages[len(self._made.messages) :])]
        return self._shaped

    def tools(self, shape: Callable[[Iterable[Mapping[str, Any]] | None], Shaped | None]) -> Shaped | None:
        """The shaped tools."""
        is_known = self._chat.tools is not None and self._chat.tools is self._made.tools
        self._tools = self._made.shaped_tools if is_known else shape(self._chat.tools)
        return self._tools

    def render(self, write: Callable[[Rendering | None], str]) -> str:
        """What `write` renders; it is given what to continue, where that may be."""
        rendered, chat = self._chat.rendered, self._chat
        if (
            rendered is None
            or chat.continue_final_message
            or not _is_small([chat.documents, chat.chat_template_kwargs])
        ):
            return write(None)
        rendering = Rendering(self._made.loops)
        text = write(rendering)
        if len(rendered) >= _MAX_MADE and self._key not in rendered:
            rendered.clear()
        rendered[self._key] = _Made(chat.messages, self._is_text, self._shaped, chat.tools, self._tools, rendering.kept)
        return text


def not_rendered(chat: Chat) -> Sent:
    """The messages of a chat that may have media in them: those that were not rendered as text before."""
    if not chat.rendered:
        return chat.messages
    made: Iterable[_Made] = tuple(chat.rendered.values())
    known = (len(each.messages) for each in made if each.is_text and begins_with(chat.messages, each.messages))
    return chat.messages[max(known, default=0) :]


def _is_small(value: object) -> bool:
    """Whether decoded JSON takes little memory."""
    waiting, left = [value], _MAX_VARIABLES
    while waiting:
        value = waiting.pop()
        if isinstance(value, str | list | dict):
            left -= len(value)
        if left < 0:
            return False
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
    return True
