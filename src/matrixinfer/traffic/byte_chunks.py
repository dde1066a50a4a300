"""Cuts a prompt's bytes into chained chunks, which recognise its beginning where token ids are unknown. Pure.

A chunk is `CHUNK_BYTES` of text, or less text and the image, audio or video behind it, whatever its size. Its hash covers
all bytes before it, like a block's. So two turns of one conversation have the same first chunks, and two images differ.

    h[0] = u64(SHA-256("bytes" ‖ salt)[:8]),  h[i] = u64(SHA-256(h[i-1] as 8 bytes big endian ‖ bytes)[:8])

with the top bit cleared; h[0] is no chunk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal, NamedTuple, TypeAlias

Kind: TypeAlias = Literal["image", "audio", "video"]

CHUNK_BYTES = 512
MOST_CHUNKS = 8192
"""Chunks of one prompt: 4 MiB of text. Further bytes are counted, but not recognised."""

_TOP_BIT_CLEARED = (1 << 63) - 1

_MEDIUM = re.compile(
    rb'"(image_url|audio_url|video_url|input_audio|image_embeds|audio_embeds|video_embeds|source|file_data)"\s*:\s*'
    rb'(?:\{\s*(?:"(?:detail|format|type|media_type|uuid)"\s*:\s*(?:"[^"\\]*"|null)\s*,\s*)*"(?:url|data)"\s*:\s*)?"'
)
"""The key of a medium in a message's JSON, up to the quote before its URL or data. A quote within text is escaped, so
text that looks like this does not match."""


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


def cut(prompt: bytes, *, salt: str | None = None, has_media: bool = True, most: int = MOST_CHUNKS) -> Chunks:
    """Cut `prompt`, of which at most `most` chunks are hashed. Without `has_media` all of it is text."""
    view, hashes, ends, kinds = memoryview(prompt), list[int](), list[int](), list[Kind | None]()
    parent = sha256(b"bytes" if salt is None else b"bytes\0" + salt.encode()).digest()[:8]
    counts: dict[Kind, int] = {}
    before: int | None = None
    start = text = 0

    def add(end: int, bytes_of_text: int, kind: Kind | None) -> None:
        nonlocal parent, start, text
        text += bytes_of_text
        if len(hashes) < most:
            state = sha256(parent)
            state.update(view[start:end])
            parent = state.digest()[:8]
            hashes.append(int.from_bytes(parent, "big") & _TOP_BIT_CLEARED)
            ends.append(text)
            kinds.append(kind)
        start = end

    for medium in _media(prompt) if has_media else ():
        while start + CHUNK_BYTES <= medium.start:
            add(start + CHUNK_BYTES, CHUNK_BYTES, None)
        add(medium.end, medium.start - start, medium.kind)
        before = text if before is None else before
        counts[medium.kind] = counts.get(medium.kind, 0) + 1
    while start + CHUNK_BYTES <= len(prompt) and len(hashes) < most:
        add(start + CHUNK_BYTES, CHUNK_BYTES, None)
    text += len(prompt) - start
    return Chunks(
        hashes=tuple(hashes),
        text=tuple(ends),
        kinds=tuple(kinds),
        text_bytes=text,
        media=counts,
        before_media=text if before is None else before,
    )


def _media(prompt: bytes) -> Iterator[Medium]:
    position = 0
    while found := _MEDIUM.search(prompt, position):
        end = prompt.find(b'"', found.end())
        if end < 0:
            return
        position = end + 1
        yield Medium(_kind(found), found.end(), end)


def _kind(found: re.Match[bytes]) -> Kind:
    name = found[1]
    if b"audio" in name:
        return "audio"
    return "video" if b"video" in name else "image"
