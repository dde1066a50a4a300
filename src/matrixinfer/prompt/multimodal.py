"""The text before the first image, audio or video of a chat: what is certain of such a prompt.

vLLM gives a template that walks content parts each medium as a part of its own, and the template writes its own
placeholder. Where content is one string, vLLM puts a placeholder of the model's into the message's text, in front of
it or in between. Either way the engine replaces it by as many tokens as the medium has. Nothing of that is guessed:
the chat is rendered with marks where media are, and only what every rendering begins with is taken.
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
"""Private characters: text that has them, too, only makes the certain part shorter."""

_KINDS = (
    ("image", ("image_url", "input_image", "image_pil", "image_embeds")),
    ("audio", ("audio_url", "input_audio", "audio_embeds")),
    ("video", ("video_url", "video_embeds")),
)
"""What vLLM calls a part for the template, by the part's type or, where it has none, by its key."""


def before_media(chat: Chat, write: _Write, *, parts: bool) -> str:
    """The beginning of the chat's text that comes before its first medium, possibly empty.

    `write` is given messages as `engine_messages` shapes them, `parts` says in which form, and returns the template's
    text. A tokenizer may join the last characters with what follows. Raises `TokenizeError`.
    """
    first = next((i for i, message in enumerate(chat.messages) if has_media([message])), None)
    if first is None:
        raise TokenizeError("the prompt carries no images, audio or video")

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


def _marked(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with marks for media."""
    if not has_media([message]):
        return message
    return {**message, "content": [_text(_MARK) if is_media(part) else part for part in message["content"]]}


def _media_first(message: Mapping[str, Any]) -> object:
    content = message.get("content")
    return sorted(content, key=lambda part: part != _text(_MARK)) if isinstance(content, list) else content


def _with_media(messages: Sequence[Mapping[str, Any]], shaped: list[_Message]) -> list[_Message]:
    """The shaped messages with the parts that the template is really given for media."""
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
    raise TokenizeError("a message carries content of an unknown kind")


def _keeps_order(message: Mapping[str, Any], write: _Write) -> bool:
    """True when the template writes a message's text that comes before its first medium in that order.

    Some write all images first. It is tried with texts that cannot be taken for a placeholder.
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
    """What comes before the first mark; nothing when the template drops it."""
    at = text.find(_MARK)
    return text[: max(at, 0)]


def _common(text: str, other: str) -> str:
    """What both begin with."""
    return text[: bisect_left(range(len(text)), 1, key=lambda i: not other.startswith(text[: i + 1]))]
