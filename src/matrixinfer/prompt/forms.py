"""Finds fields of `multipart/form-data` bodies (RFC 7578), such as uploads of audio, without decoding the rest."""

from __future__ import annotations

import re

MULTIPART = "multipart/form-data"
_MAX_HEAD_BYTES = 4096
"""The headers of a part are sought within so many bytes."""
_MAX_BOUNDARY_BYTES = 70 + 2
_MAX_VALUE_BYTES = 8192
_PLAIN_TYPE = re.compile(r"multipart/form-data; ?boundary=(\"?)([A-Za-z0-9'()+_,./:=?-]{1,70})\1", re.IGNORECASE)
_PLAIN_HEAD = re.compile(
    rb"(?i)(?:content-(?:type|length): ?[^\r\n\0]*\r\n)*"
    rb'content-disposition: ?form-data; ?name="([^"\\\r\n]*)"(?:; ?filename="[^"\\\r\n]*")?'
    rb"(?:\r\ncontent-(?:type|length): ?[^\r\n\0]*)*"
)
_NAME = re.compile(rb'(?i)^content-disposition:[^\r\n]*?[; \t]name=(?:"([^"\r\n]*)"|([^\s;"]+))', re.MULTILINE)


def find_field(body: bytes, name: str) -> slice | None:
    """Where the value of the first field of that name is; None if there is none, or the body is not a form."""
    end = body.find(b"\r\n", 0, _MAX_BOUNDARY_BYTES + 2)
    if not body.startswith(b"--") or end < 0:
        return None
    delimiter = b"\r\n" + body[:end].rstrip(b" \t")
    position = end
    wanted = name.encode()
    while position >= 0:
        head_end = body.find(b"\r\n\r\n", position, position + _MAX_HEAD_BYTES)
        if head_end < 0:
            return None
        start = head_end + 4
        stop = body.find(delimiter, head_end + 2)
        if stop < 0:
            return None
        named = _NAME.search(body, position, head_end)
        if named is not None and (named[1] if named[1] is not None else named[2]) == wanted:
            return slice(min(start, stop), stop)
        position = body.find(b"\r\n", stop + len(delimiter))
    return None


def field(body: bytes, name: str) -> str | None:
    """The value of the first field of that name; None without one, or if it is too long or not UTF-8."""
    found = find_field(body, name)
    if found is None or found.stop - found.start > _MAX_VALUE_BYTES:
        return None
    try:
        return body[found].decode()
    except UnicodeDecodeError:
        return None


def with_field(body: bytes, name: str, value: str) -> bytes:
    """The body with another value of a field that it has; otherwise the body itself."""
    found = find_field(body, name)
    return body if found is None else b"".join((body[: found.start], value.encode(), body[found.stop :]))


def is_plain(body: bytes, content_type: str, *, once: str) -> bool:
    """Whether the body is a form that leaves no choice in reading it, in which the field `once` comes once at most."""
    kind = _PLAIN_TYPE.fullmatch(content_type.strip())
    if kind is None:
        return False
    delimiter, count = f"\r\n--{kind[2]}".encode(), 0
    position = len(delimiter) - 2
    if body[:position] != delimiter[2:]:
        return False
    while body[position : position + 2] == b"\r\n":
        head_end = body.find(b"\r\n\r\n", position + 2, position + _MAX_HEAD_BYTES)
        head = None if head_end < 0 else _PLAIN_HEAD.fullmatch(body, position + 2, head_end)
        stop = body.find(delimiter, head_end + 4)
        if head is None or stop < 0:
            return False
        count += head[1] == once.encode()
        position = stop + len(delimiter)
    return count <= 1 and body[position:] in (b"--", b"--\r\n")
