"""Reads large requests without decoding what routing has no use for.

The values of images, audio and video are neither decoded nor copied: only where they are matters, and that they are
there. Token ids are read piece by piece into four bytes each. What then still exceeds the bounds is routed by its bytes.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from typing import Any, NamedTuple, TypeAlias

import msgspec
import numpy as np
from msgspec import Raw, Struct
from msgspec.structs import replace

from matrixinfer.blocks import TokenIds
from matrixinfer.errors import UNREADABLE
from matrixinfer.prompt import fields
from matrixinfer.prompt.anthropic import COUNT_PATH
from matrixinfer.prompt.base import Prompt, TokenId
from matrixinfer.prompt.bounds import Bounds, TooMuch, count_of, values_of
from matrixinfer.prompt.effort import check
from matrixinfer.prompt.outline import LEFT_OUT, SOURCES
from matrixinfer.prompt.responses import RESPONSES_PATH

Reader: TypeAlias = Callable[[str, bytes], Prompt]
Claim: TypeAlias = Callable[[int], bool]

_PIECE_BYTES = 64 * 1024
_ID_BYTES = 4
_COMMA = 0x2C
_LONG_BYTES = 1024
"""Shorter values are kept, whatever they are."""
_MEDIA = frozenset(
    {
        *("image_url", "audio_url", "video_url", "input_audio", "image_embeds", "audio_embeds", "video_embeds"),
        *("source", "file", "file_data", "image", "audio", "video", "data"),
    }
)
"""Keys of a content part whose values are media, or say where they are."""
_OTHER_PARTS = frozenset(
    {
        *(b"text", b"input_text", b"output_text", b"refusal", b"thinking", b"redacted_thinking"),
        *(b"tool_use", b"tool_reference", b"function_call", b"custom_tool_call", b"reasoning"),
    }
)
"""Types of parts whose values are not media, whatever their keys are."""
_NESTED = ("content", "output")
"""Keys of messages and of tool results that hold parts."""


class _Skimmed(Struct, kw_only=True, omit_defaults=True):
    """Every field that a reader takes, undecoded."""

    model: Raw = fields.NULL
    messages: Raw = fields.NULL
    input: Raw = fields.NULL
    prompt: Raw = fields.NULL
    stream: Raw = fields.NULL
    cache_salt: Raw = fields.NULL
    truncate_prompt_tokens: Raw = fields.NULL
    truncation_side: Raw = fields.NULL
    kv_transfer_params: Raw = fields.NULL
    add_generation_prompt: Raw = fields.NULL
    continue_final_message: Raw = fields.NULL
    add_special_tokens: Raw = fields.NULL
    chat_template: Raw = fields.NULL
    chat_template_kwargs: Raw = fields.NULL
    tools: Raw = fields.NULL
    documents: Raw = fields.NULL
    reasoning_effort: Raw = fields.NULL
    reasoning: Raw = fields.NULL
    tool_choice: Raw = fields.NULL
    input_ids: Raw = fields.NULL
    echo: Raw = fields.NULL
    logprobs: Raw = fields.NULL
    prompt_logprobs: Raw = fields.NULL
    prompt_embeds: Raw = fields.NULL
    suffix: Raw = fields.NULL
    system: Raw = fields.NULL
    thinking: Raw = fields.NULL
    output_config: Raw = fields.NULL
    instructions: Raw = fields.NULL
    previous_response_id: Raw = fields.NULL
    user: Raw = fields.NULL
    safety_identifier: Raw = fields.NULL
    metadata: Raw = fields.NULL
    previous_input_messages: Raw = fields.NULL
    truncation: Raw = fields.NULL
    max_tokens_per_query: Raw = fields.NULL
    query: Raw = fields.NULL
    queries: Raw = fields.NULL
    data_1: Raw = fields.NULL
    text_1: Raw = fields.NULL


_SKIMMED = msgspec.json.Decoder(_Skimmed)
_SHARED = msgspec.json.Decoder(fields.Request)
_IDS = msgspec.json.Decoder(list[TokenId])
_LIST = msgspec.json.Decoder(list[Raw])
_OBJECT = msgspec.json.Decoder(dict[str, Raw])
_MEDIUM = re.compile(rb'"(?:image|audio|video|input_audio|source|file|data)[a-z_]*"\s*:\s*(?:\{|"[^"]{1024})')
_SENT_IDS = re.compile(rb'"(?:prompt|input)"\s*:\s*\[\s*\d')
_FLAT_IDS = re.compile(rb"\s*\[\s*\d")
_ESCAPE = re.compile(rb"\\")
_LISTED = re.compile(rb"\s*\[")
_OBJECTS = re.compile(rb"\s*\{")
_DEPTH = 2
"""Messages hold parts, and the parts that are tool results hold parts."""


def may_hold_media(body: bytes) -> bool:
    """Whether there is a long value or an object under a key that media have."""
    return _MEDIUM.search(body) is not None


def may_be_ids(body: bytes | memoryview) -> bool:
    """Whether a prompt seems to be a list of token ids."""
    return _SENT_IDS.search(body) is not None


def read_large(read: Reader, path: str, body: bytes, bounds: Bounds, claim: Claim) -> Prompt:
    """Read a request with the reader of its API, or without its prompt if that has too much in it. Raises `InvalidRequest`.

    `claim` takes the memory for what is decoded, and returns whether there is room.
    """
    skimmed = fields.decode(_SKIMMED, body)
    try:
        ids = _token_ids(skimmed, bounds, claim)
        if ids is None:
            bounds.check_values(values_of(body))
            changed = _without_media(skimmed)
        else:
            changed = {ids.name: Raw(b"[0]")}
        reduced = msgspec.json.encode(replace(skimmed, **changed)) if changed else body
        _claimed(claim, bounds.cost(reduced))
    except (TooMuch, *UNREADABLE) as error:
        why = str(error) if isinstance(error, TooMuch) else "its parts cannot be read"
        return _unread(path, body, skimmed, why)
    prompt = replace(read(path, reduced), size=len(reduced))
    if ids is not None:
        return replace(prompt, token_ids=None if prompt.token_ids is None else ids.ids, **_prefix(memoryview(ids.sent)))
    for name, without in changed.items():
        prompt = replace(prompt, **_prefix(_restored(prompt.prefix, bytes(without), getattr(skimmed, name))))
    return prompt


def _claimed(claim: Claim, cost: int) -> None:
    if not claim(cost):
        raise TooMuch("other large requests take the memory that it would need")


class _SentIds(NamedTuple):
    name: str
    sent: Raw
    ids: TokenIds


def _token_ids(skimmed: _Skimmed, bounds: Bounds, claim: Claim) -> _SentIds | None:
    """The token ids of a prompt that is a long list of them, and the name of its field. Raises `TooMuch`."""
    for name in ("prompt", "input"):
        sent: Raw = getattr(skimmed, name)
        if _size(sent) <= _PIECE_BYTES or not _FLAT_IDS.match(sent):
            continue
        if _size(sent) > bounds.max_id_bytes:
            raise TooMuch(f"the token ids are more than {bounds.max_id_bytes} bytes")
        count = count_of(memoryview(sent), _COMMA) + 1
        _claimed(claim, count * _ID_BYTES)
        ids, filled = np.empty(count, dtype=np.uint32), 0
        for piece in _pieces(memoryview(sent)):
            check()
            some = array("I", _IDS.decode(b"[%b]" % piece))
            ids[filled : filled + len(some)] = some
            filled += len(some)
        return _SentIds(name, sent, ids)
    return None


def _pieces(listed: memoryview) -> Iterator[bytes]:
    """A JSON list of numbers in pieces, each a few numbers with commas between them."""
    start, size, before = 0, _PIECE_BYTES, b"["
    while start < len(listed):
        piece = bytes(listed[start : start + size])
        is_last = start + size >= len(listed)
        end = len(piece) if is_last else piece.rfind(b",")
        if end < 0:
            size *= 2  # nothing but white space
            continue
        start, size = start + end + 1, _PIECE_BYTES
        piece = piece[:end]
        if before:
            piece, before = piece.lstrip().removeprefix(before), b""
        yield piece.rstrip().removesuffix(b"]") if is_last else piece


def _without_media(skimmed: _Skimmed) -> dict[str, Raw]:
    """The fields that hold media, with a stand-in for each."""
    sent: dict[str, Raw] = {name: getattr(skimmed, name) for name in ("messages", "input")}
    return {name: without for name, each in sent.items() if (without := _stood_in(each, depth=0)) is not None}


def _stood_in(sent: Raw, *, depth: int) -> Raw | None:
    """A list of messages (at depth 0) or parts with a stand-in for each medium; None if there is none."""
    if _size(sent) <= _LONG_BYTES or not _LISTED.match(sent):
        return None
    items, changed = _LIST.decode(sent), False
    for i, item in enumerate(items):
        if _size(item) <= _LONG_BYTES or not _OBJECTS.match(item):
            continue
        check()
        entries = _OBJECT.decode(item)
        replaced = {key: _left_out(key, entries[key]) for key in _media_keys(entries)} if depth else {}
        for key in _NESTED if depth < _DEPTH else ():
            if key in entries and (without := _stood_in(entries[key], depth=depth + 1)) is not None:
                replaced[key] = without
        if replaced:
            items[i] = Raw(msgspec.json.encode(entries | replaced))
            changed = True
    return Raw(msgspec.json.encode(items)) if changed else None


def _left_out(key: str, value: Raw) -> Raw:
    """What stands for a medium: the digest of its data, or nothing if that is not in the request."""
    source = value
    if key in SOURCES and _OBJECTS.match(value):
        source = _OBJECT.decode(value).get(SOURCES[key], fields.NULL)
    data = memoryview(source)[1:-1]
    is_data = key == "input_audio" or bytes(data[:5]) == b"data:"
    # With an escape in it, the data is something else than these bytes.
    known = is_data and _ESCAPE.search(data) is None
    return Raw(msgspec.json.encode({LEFT_OUT: sha256(data).hexdigest() if known else None}))


def _media_keys(part: Mapping[str, Raw]) -> Iterator[str]:
    """The keys of a part whose values are large media."""
    sent = part.get("type", fields.NULL)  # engines accept parts without one
    kind = bytes(sent) if _size(sent) < _LONG_BYTES else b""
    if kind.strip(b'"') not in _OTHER_PARTS:
        yield from (key for key, value in part.items() if key in _MEDIA and _size(value) > _LONG_BYTES)


def _unread(path: str, body: bytes, skimmed: _Skimmed, why: str) -> Prompt:
    """A request of which only the bytes of its prompt are known."""
    sent = (skimmed.tools, skimmed.system, skimmed.messages, skimmed.prompt, skimmed.input, skimmed.query)
    is_one = skimmed.messages != fields.NULL or path == RESPONSES_PATH
    prompt = fields.prompt(
        path,
        fields.decode(_SHARED, body),
        len(body),
        prefix=b"" if path == COUNT_PATH else b"".join(each for each in sent if each != fields.NULL),
        add_special_tokens=False,
        inexact=why,
        counted=is_one,
    )
    previous = skimmed.previous_response_id
    return prompt if previous == fields.NULL else replace(prompt, response_id=_text(previous))


def _text(value: Raw) -> str | None:
    try:
        return msgspec.json.decode(value, type=str)
    except UNREADABLE:
        return None


def _restored(prefix: bytes | memoryview, without: bytes, sent: Raw) -> bytes | memoryview:
    """A prefix that ends with a field, with the field as it was sent; a view into the body if it is nothing else."""
    before = bytes(prefix).removesuffix(without)
    return b"".join((before, sent)) if before and len(before) < len(prefix) else memoryview(sent)


def _prefix(prefix: bytes | memoryview) -> dict[str, Any]:
    return {"prefix": prefix, "prefix_bytes": len(prefix)}


def _size(sent: Raw) -> int:
    return memoryview(sent).nbytes
