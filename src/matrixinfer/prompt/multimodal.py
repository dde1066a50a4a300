"""Renders the text before the first image, audio or video of a chat: the only part of such a prompt that is certain.

If a template takes content parts, vLLM passes each medium as a part and the template writes a placeholder. If content
is one string, vLLM inserts the model's placeholder into the message's text, before or inside it. Either way the engine
replaces the placeholder by as many tokens as the medium needs. None of that is guessed here: the chat is rendered with
marks in place of media, and only the text that all renderings begin with is used.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matrixinfer.errors import TokenizeError
from matrixinfer.prompt.base import Chat
from matrixinfer.prompt.conversation import engine_messages, has_media, is_media

_Message = dict[str, Any]
_Write = Callable[[list[_Message]], str]

_MARK = "\ue000medium\ue001"
"""Private-use characters. If a text contains them as well, the certain part only gets shorter."""

_KINDS = (
    ("image", ("image_url", "input_image", "image_pil", "image_embeds")),
    ("audio", ("audio_url", "input_audio", "audio_embeds")),
    ("video", ("video_url", "video_embeds")),
)
"""The part type that vLLM passes to the template, and the part types (or keys, if there is no type) that map to it."""


def before_media(chat: Chat, write: _Write, *, parts: bool) -> str:
    """The chat's text before its first medium, possibly empty.

    `write` renders messages in the form of `engine_messages`; `parts` selects that form. A tokenizer may merge the last
    characters with the text that follows. Raises `TokenizeError`.
    """
    first = next((i for i, message in enumerate(chat.messages) if has_media([message])), None)
    if first is None:
        raise TokenizeError("the prompt contains no images, audio or video")

    def shaped(messages: Sequence[Mapping[str, Any]]) -> list[_Message]:
        return engine_messages(messages, parts=parts, in_schema_order=chat.in_schema_order)

    marked = [_marked(message) for message in chat.messages]
    if not parts:
        in_front = [{**message, "content": _media_first(message)} for message in marked]
        return _common(_before_mark(write(shaped(in_front))), write(shaped(marked)))
    real = write(_with_media(chat.messages, shaped(marked)))
    if not _keeps_order(chat.messages[first], write):
        marked[first] = {**marked[first], "content": [_text(_MARK)]}
    return _common(_before_mark(write(shaped(marked))), real)


def with_media(chat: Chat, write: _Write) -> str:
    """The whole chat as a template that takes parts writes it, with its own placeholders. Raises `TokenizeError`."""
    marked = [_marked(message) for message in chat.messages]
    return write(_with_media(chat.messages, engine_messages(marked, parts=True, in_schema_order=chat.in_schema_order)))


def _marked(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with marks in place of media."""
    if not has_media([message]):
        return message
    return {**message, "content": [_text(_MARK) if is_media(part) else part for part in message["content"]]}


def _media_first(message: Mapping[str, Any]) -> object:
    content = message.get("content")
    return sorted(content, key=lambda part: part != _text(_MARK)) if isinstance(content, list) else content


def _with_media(messages: Sequence[Mapping[str, Any]], shaped: list[_Message]) -> list[_Message]:
    """The shaped messages with the media parts that the template really gets."""
    return [
        {**after, "content": _parts(before["content"])} if has_media([before]) else after
        for before, after in zip(messages, shaped, strict=True)
    ]


def _parts(content: list[Any]) -> list[_Message]:
    parts: list[_Message] = []
    for part in content:
        if is_media(part):
            parts.append(_medium(part))
        else:
            (message,) = engine_messages([{"role": "user", "content": [part]}], parts=True)
            parts += message["content"]
    return parts


def _medium(part: object) -> _Message:
    if isinstance(part, dict):
        named = (part.get("type"),) if part.get("type") is not None and part.get("uuid") is None else tuple(part)
        for kind, names in _KINDS:
            if any(name in names for name in named):
                return {"type": kind}
    raise TokenizeError("a message contains content of an unknown type")


def _keeps_order(message: Mapping[str, Any], write: _Write) -> bool:
    """True when the template writes the text before a message's first medium in the original order.

    Some templates write all images first. This is tested with texts that cannot be confused with a placeholder.
    """
    content = message["content"]
    at = next(i for i, part in enumerate(content) if is_media(part))
    if at == 0:
        return True
    texts = [_text(f"\ue002{i}\ue003") for i in range(at)]
    try:
        marked, real = (
            write([{"role": message.get("role"), "content": [*texts, last]}])
            for last in (_text(_MARK), _medium(content[at]))
        )
    except TokenizeError:
        return False
    return _MARK in marked and real.startswith(_before_mark(marked))


def _text(text: str) -> _Message:
    return {"type": "text", "text": text}


def _before_mark(text: str) -> str:
    """The text before the first mark, or "" if the template dropped the mark."""
    at = text.find(_MARK)
    return text[: max(at, 0)]


def _common(text: str, other: str) -> str:
    """The longest common prefix."""
    return text[: bisect_left(range(len(text)), 1, key=lambda i: not other.startswith(text[: i + 1]))]
