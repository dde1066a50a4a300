"""The outline of a prompt with media: its token ids with one placeholder where each medium is, as the template writes it.

The engine replaces a placeholder by as many tokens as the medium needs, which only its events show (`trust.media`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from matrixinfer.blocks import TokenIds
from matrixinfer.prompt.conversation import is_media

if TYPE_CHECKING:
    from matrixinfer.prompt.base import Chat


_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outline:
    """Token ids, shape (n,), and what the media are, in their order."""

    ids: TokenIds
    contents: tuple[bytes, ...]

    def names_of(self, number: int) -> tuple[bytes, ...]:
        """A medium's content and, if it has a `uuid`, what its content is in requests with the `uuid` alone."""
        content = self.contents[number]
        return (content,) if len(content) == _DIGEST_BYTES else (content, content[:_DIGEST_BYTES])


def contents_of(chat: Chat) -> tuple[bytes, ...] | None:
    """A digest of each medium of a chat; None if the bytes of one are not in the request, or if kinds are mixed.

    Engines order the media of several kinds in their own way. A URL says nothing of the bytes behind it.
    """
    found: list[bytes] = []
    kinds: set[str] = set()
    for message in chat.messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if not is_media(part):
                continue
            kind, digest = _content(part)
            if digest is None:
                return None
            kinds.add(kind)
            found.append(digest)
    return tuple(found) if len(kinds) == 1 else None


def _content(part: object) -> tuple[str, bytes | None]:
    if not isinstance(part, Mapping):
        return "", None
    kind = next((key for key in _SOURCES if part.get(key) is not None), "")
    uuid, data = part.get("uuid"), _data(part, kind)
    if data is None and not isinstance(uuid, str):
        return kind, None
    content = b"" if data is None else _digest(kind, "data", data)
    if isinstance(uuid, str):
        # With options for the processor an engine goes by the name alone, so what was sent under it counts as well.
        content = _digest(kind, "uuid", uuid) + content
    return kind, content


def _digest(*texts: str) -> bytes:
    return sha256("\0".join(texts).encode("utf-8", "surrogatepass")).digest()


_SOURCES = {"image_url": "url", "audio_url": "url", "video_url": "url", "input_audio": "data"}
"""Keys of content parts, and the key of their URL or data."""


def _data(part: Mapping[str, Any], kind: str) -> str | None:
    """The data of a medium in the request."""
    source: object = part.get(kind)
    if isinstance(source, Mapping):
        source = source.get(_SOURCES[kind])
    if not isinstance(source, str):
        return None
    return source if kind == "input_audio" or source.startswith("data:") else None


def media_kwargs(body: bytes) -> bool:
    """Whether a request may set options by which engines tell media apart as well."""
    return b"mm_processor_kwargs" in body or b"media_io_kwargs" in body


def expand(outline: TokenIds, placeholders: Sequence[int], runs: Sequence[Sequence[int]]) -> list[int]:
    """The outline's ids with each placeholder replaced by a run of tokens."""
    ids: list[int] = []
    at = 0
    for position, run in zip(placeholders, runs, strict=True):
        ids += outline[at:position].tolist()
        ids += run
        at = position + 1
    ids += outline[at:].tolist()
    return ids
