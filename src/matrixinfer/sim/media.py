"""Images, audio and video in a chat, as vLLM makes them part of the prompt: each is a run of one placeholder token.

A medium has a name: its `uuid`, or a hash of its content. Block hashes depend on the names of the media in the block.
What is behind a URL is made up from the URL.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np

from matrixinfer.blocks import TokenIds
from matrixinfer.errors import InvalidRequest
from matrixinfer.prompt.conversation import is_media
from matrixinfer.prompt.outline import SOURCES

_MOST_REMEMBERED = 4096
_MIN_TOKENS, _MAX_TOKENS = 16, 1024
_CHARACTERS_PER_TOKEN = 16


class MediumRun(NamedTuple):
    """The tokens of one medium in a prompt."""

    start: int
    length: int
    name: str


def extra_keys(media: Iterable[MediumRun], start: int, end: int) -> tuple[tuple[str, int], ...]:
    """The keys of the media among the tokens [start, end): their names, and where they begin, counted from `start`."""
    return tuple(
        (each.name, each.start - start) for each in media if each.start < end and each.start + each.length > start
    )


class MediaReader:
    """Makes media part of prompts whose template writes `placeholder` for each. Raises `ValueError` if it is no token.

    As with vLLM's cache of processed media, one with a `uuid` keeps the size that it had first, and may come without
    content from then on.
    """

    def __init__(self, placeholder: TokenIds) -> None:
        if len(placeholder) != 1:
            raise ValueError(f"expected a media token that is one token, got {len(placeholder)} tokens")
        self._placeholder = int(placeholder[0])
        self._sizes: OrderedDict[str, int] = OrderedDict()

    def read(
        self, messages: Iterable[Mapping[str, Any]], outline: TokenIds, options: object = None
    ) -> tuple[TokenIds, Sequence[MediumRun]]:
        """The token ids of a chat and its media, from its ids with one placeholder for each. Raises `InvalidRequest`.

        `options` for the processor of media are part of what names them.
        """
        items = [self._item(part, options) for message in messages for part in _parts(message)]
        places = np.flatnonzero(outline == self._placeholder).tolist()
        if len(places) != len(items):
            raise InvalidRequest(f"expected {len(items)} media placeholders in the prompt, found {len(places)}")
        lengths = np.ones(len(outline), dtype=np.int64)
        lengths[places] = [length for _, length in items]
        starts = np.cumsum(lengths) - lengths
        media = [MediumRun(int(starts[at]), length, name) for at, (name, length) in zip(places, items, strict=True)]
        return np.repeat(outline, lengths), media

    def _item(self, part: Mapping[str, Any], options: object) -> tuple[str, int]:
        """The name of a medium and how many tokens it has."""
        kind = next((key for key in SOURCES if key in part), None)
        if kind is None:
            raise InvalidRequest("expected images, audio or video", param="messages")
        source, uuid = part[kind], part.get("uuid")
        content = source.get(SOURCES[kind]) if isinstance(source, dict) else source
        name = uuid if isinstance(uuid, str) and options is None else _hash(kind, uuid or content, options)
        if name not in self._sizes:
            if not isinstance(content, str):
                raise InvalidRequest("expected a medium's content, or the uuid of one that was sent", param="messages")
            self._sizes[name] = min(_MAX_TOKENS, _MIN_TOKENS + len(content) // _CHARACTERS_PER_TOKEN)
        self._sizes.move_to_end(name)
        length = self._sizes[name]
        if len(self._sizes) > _MOST_REMEMBERED:
            self._sizes.popitem(last=False)
        return name, length


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message.get("content")
    return [part for part in content if is_media(part)] if isinstance(content, list) else []


def _hash(kind: str, content: object, options: object) -> str:
    return sha256(repr((kind, content, options)).encode("utf-8", "surrogatepass")).hexdigest()
