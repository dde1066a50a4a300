"""Cuts a prompt's bytes into chained chunks, which recognise its beginning where token ids are unknown. Pure.

A chunk is `CHUNK_BYTES` of text, or less text and the image, audio or video behind it, whatever its size. Its hash covers
all bytes before it, like a block's. So two turns of one conversation have the same first chunks, and two images differ.

    p[0] = SHA-256("bytes" [‖ 0 ‖ salt])[:8],  p[i] = SHA-256(p[i-1] ‖ the chunk's bytes)[:8]

The hash of a chunk is p[i] as a number, big endian, with the top bit cleared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal, NamedTuple, TypeAlias

from matrixinfer.blocks.names import TOP_BIT_CLEARED

Kind: TypeAlias = Literal["image", "audio", "video"]

CHUNK_BYTES = 512
MOST_CHUNKS = 8192
"""Chunks of one prompt: 4 MiB of text. Further bytes are counted, but not recognised."""


_MEDIUM = re.compile(
    rb'"(image_url|audio_url|video_url|input_audio|image_embeds|audio_embeds|video_embeds|source|file_data)"\s*:\s*'
    rb'(?:\{\s*(?:"(?:detail|format|type|media_type|uuid)"\s*:\s*(?:"[^"\\]*"|null)\s*,\s*)*"(?:url|data)"\s*:\s*)?"'
)
"""The key of a medium in a message's JSON, up to the quote before its URL or data. A quote within text is escaped, so
text that looks like this does not match."""
_QUOTE = re.compile(rb'"')


class Medium(NamedTuple):
    """An image, audio or video in a prompt: which bytes are its URL or its data."""

    kind: Kind
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """A prompt's chunks, and what they are made of."""

    hashes: tuple[int, ...]
    text: tuple[int, ...]
    """Bytes of text from the prompt's start to the end of each chunk."""
    kinds: tuple[Kind | None, ...]
    """The medium at the end of each chunk, if there is one."""
    text_bytes: int
    """Bytes of text in the whole prompt."""
    media: Mapping[Kind, int]
    """How many media the whole prompt has, by kind."""
    before_media: int
    """Bytes of text before the first medium."""


def cut(
    prompt: bytes | memoryview, *, salt: str | None = None, has_media: bool = True, most: int = MOST_CHUNKS
) -> Chunks:
    """Cut `prompt`, of which at most `most` chunks are hashed. Without `has_media` all of it is text."""
    cutter = _Cutter(prompt, salt, most)
    media: dict[Kind, int] = {}
    before: int | None = None
    for medium in _media(prompt) if has_media else ():
        cutter.take_text(medium.start)
        cutter.take(medium.end, medium.start - cutter.start, medium.kind)
        before = cutter.text if before is None else before
        media[medium.kind] = media.get(medium.kind, 0) + 1
    cutter.take_text(len(prompt))
    text = cutter.text + len(prompt) - cutter.start
    return Chunks(
        hashes=tuple(cutter.hashes),
        text=tuple(cutter.ends),
        kinds=tuple(cutter.kinds),
        text_bytes=text,
        media=media,
        before_media=text if before is None else before,
    )


class _Cutter:
    """The chunks up to `start`, where the next one begins."""

    def __init__(self, prompt: bytes | memoryview, salt: str | None, most: int) -> None:
        self.start = self.text = 0
        self.hashes: list[int] = []
        self.ends: list[int] = []
        self.kinds: list[Kind | None] = []
        self._view = memoryview(prompt)
        self._most = most
        self._parent = sha256(b"bytes" if salt is None else b"bytes\0" + salt.encode()).digest()[:8]

    def take_text(self, end: int) -> None:
        """Cut full chunks of text, at most up to `end`."""
        while self.start + CHUNK_BYTES <= end:
            self.take(self.start + CHUNK_BYTES, CHUNK_BYTES, None)

    def take(self, end: int, text_bytes: int, kind: Kind | None) -> None:
        """Cut a chunk that ends at `end`, of which `text_bytes` are text and the rest is a medium of this kind."""
        self.text += text_bytes
        if len(self.hashes) < self._most:
            state = sha256(self._parent)
            state.update(self._view[self.start : end])
            self._parent = state.digest()[:8]
            self.hashes.append(int.from_bytes(self._parent, "big") & TOP_BIT_CLEARED)
            self.ends.append(self.text)
            self.kinds.append(kind)
        self.start = end


def _media(prompt: bytes | memoryview) -> Iterator[Medium]:
    position = 0
    while found := _MEDIUM.search(prompt, position):
        quote = _QUOTE.search(prompt, found.end())
        if quote is None:
            return
        position = quote.end()
        yield Medium(_kind(found), found.end(), quote.start())


def _kind(found: re.Match[bytes]) -> Kind:
    name = found[1]
    if b"audio" in name:
        return "audio"
    return "video" if b"video" in name else "image"
