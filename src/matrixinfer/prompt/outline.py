"""The outline of a prompt with media: its token ids with one placeholder where each medium is, as the template writes it.

The engine replaces a placeholder by as many tokens as the medium needs, which only its events show (`trust.media`).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from matrixinfer.blocks import TokenIds
from matrixinfer.prompt.conversation import is_media

if TYPE_CHECKING:
    from matrixinfer.prompt.base import Chat


SOURCES = {"image_url": "url", "audio_url": "url", "video_url": "url", "input_audio": "data"}
"""Keys of content parts, and the key of their URL or data."""
LEFT_OUT = f"left_out_{secrets.token_hex(16)}"
"""Key of what stands for a medium that was not decoded: its digest in hexadecimal digits, or null.

No client can know it: one that could would send any image under the digest of another.
"""
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
    kinds = [key for key in SOURCES if key in part]
    kind = next((key for key in kinds if part[key] is not None), kinds[0] if kinds else "")
    uuid, data = part.get("uuid"), _digest(part, kind)
    if data is None and not isinstance(uuid, str):
        return kind, None
    content = b"" if data is None else _hash(kind, "data", data)
    if isinstance(uuid, str):
        # With options for the processor an engine goes by the name alone, so what was sent under it counts as well.
        content = _hash(kind, "uuid", uuid.encode("utf-8", "surrogatepass")) + content
    return kind, content


def _hash(kind: str, what: str, data: bytes) -> bytes:
    return sha256(f"{kind}\0{what}\0".encode() + data).digest()


def _digest(part: Mapping[str, Any], kind: str) -> bytes | None:
    """The digest of a medium's data; None if that is not in the request."""
    source: object = part.get(kind)
    if isinstance(source, Mapping):
        if isinstance(left_out := source.get(LEFT_OUT), str):
            return left_out.encode()
        source = source.get(SOURCES[kind])
    if not isinstance(source, str) or not (kind == "input_audio" or source.startswith("data:")):
        return None
    return sha256(source.encode("utf-8", "surrogatepass")).hexdigest().encode()


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
