"""What was made of a conversation so far, so that only its new messages are shaped and rendered.

`read_chats` gives a chat that continues another one the very same messages, and what was made of them (`Chat.rendered`).
Shaping makes what templates get of each message by itself; rendering makes one text of all.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from matrixinfer.prompt.base import Chat
from matrixinfer.prompt.dialect import Dialect
from matrixinfer.prompt.resuming import Kept, Rendering, begins_with

_MAX_MADE = 4
"""For how many kinds of engines and templates a conversation is remembered."""
_MAX_VARIABLES = 1000
"""Values and characters in a request's variables and documents: `ReadChats` does not count the memory of these."""

Shaped = list[dict[str, Any]]
Sent = Sequence[Mapping[str, Any]]


class _Write(Protocol):
    def __call__(self, *, rendering: Rendering | None) -> str: ...


class _Made(NamedTuple):
    """What was made of a chat."""

    messages: Sent
    shaped: Shaped
    tools: Sent | None
    shaped_tools: Shaped | None
    loops: dict[int, Kept]


_NOTHING = _Made((), [], None, None, {})


class Grown:
    """What is made of a chat for one kind of engine, with what `key` names: a template, and how messages are shaped for it.

    It starts with what was made of the chat that this one continues, and `render` keeps it for those that continue this one.
    """

    def __init__(self, chat: Chat, kind: Dialect, *key: Hashable) -> None:
        self._chat = chat
        self._key = kind, key
        made = _NOTHING if chat.rendered is None else chat.rendered.get(self._key, _NOTHING)
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

    def render(self, write: _Write) -> str:
        """What `write` renders. It gets a `Rendering` that continues the earlier one, unless nothing is to be kept."""
        rendered, chat = self._chat.rendered, self._chat
        if rendered is None or chat.continue_final_message:
            return write(rendering=None)
        if not _is_small([chat.documents, chat.chat_template_kwargs]):
            return write(rendering=None)
        rendering = Rendering(self._made.loops)
        text = write(rendering=rendering)
        if len(rendered) >= _MAX_MADE and self._key not in rendered:
            rendered.clear()
        rendered[self._key] = _Made(chat.messages, self._shaped, chat.tools, self._tools, rendering.kept)
        return text


def not_rendered(chat: Chat, kind: Dialect) -> Sent:
    """The messages of a chat that were never rendered for this kind of engine, so that they may hold media."""
    if not chat.rendered:
        return chat.messages
    made = [made.messages for (made_for, _), made in tuple(chat.rendered.items()) if made_for is kind]
    known = (len(each) for each in made if begins_with(chat.messages, each))
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
