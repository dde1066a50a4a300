"""Keeps tenants apart in the engines' caches: the salt goes into the body, and only to engines that take it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from matrixinfer.errors import InvalidRequest, NoPodAvailable
from matrixinfer.pods.registry import Pod
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.fields import decode, top_level
from matrixinfer.prompt.openai import CHAT_PATH, COMPLETIONS_PATH
from matrixinfer.prompt.responses import RESPONSES_PATH

_ANY = msgspec.json.Decoder(object)
_FIELD = "cache_salt"
_SGLANG_PATHS = frozenset((CHAT_PATH, COMPLETIONS_PATH, RESPONSES_PATH))
"""Where SGLang takes a salt. vLLM takes it everywhere else."""
_UNSALTED = frozenset(("/v2/embed",))
"""Where no engine takes a salt."""
_PAST_THE_SALT = frozenset(
    ("kv_transfer_params", "ec_transfer_params", "features", "bootstrap_host", "bootstrap_room", "session_params")
)
"""Fields that name blocks, media or sessions in an engine, which the salt does not tell apart."""


_ABSENT = msgspec.Raw()
_UUID = re.compile(rb'(?:u|\\u0075){2}(?:i|\\u0069)(?:d|\\u0064)"')
_LONGEST_UUID = 25
_PIECE = 256 * 1024
_MOST_PARTS = 1_000_000
"""The most values of messages. More are not decoded: they would take more memory than a request may."""


class _Fields(msgspec.Struct):
    """The fields that matter here, empty where they are not there. All others are skipped."""

    kv_transfer_params: msgspec.Raw = _ABSENT
    ec_transfer_params: msgspec.Raw = _ABSENT
    features: msgspec.Raw = _ABSENT
    bootstrap_host: msgspec.Raw = _ABSENT
    bootstrap_room: msgspec.Raw = _ABSENT
    session_params: msgspec.Raw = _ABSENT
    messages: msgspec.Raw = _ABSENT
    cache_salt: msgspec.Raw = _ABSENT
    request_id: msgspec.Raw = _ABSENT


_FIELDS = msgspec.json.Decoder(_Fields)


def salted(prompt: Prompt, body: bytes, salt: str | None) -> tuple[Prompt, bytes]:
    """The prompt with this salt, and the body with it in place of the client's own.

    Raises `InvalidRequest` if the request asks for what an engine has computed for somebody else, past the salt.
    """
    fields = decode(_FIELDS, body)
    for name in _PAST_THE_SALT:
        if bytes(getattr(fields, name)) not in (b"", b"null"):
            raise InvalidRequest(f"`{name}` cannot be used where tenants are kept apart.", param=name)
    if _names_media(fields.messages):
        raise InvalidRequest("`uuid` of media cannot be used where tenants are kept apart.", param="messages")
    dropped = {_FIELD, "request_id"} if prompt.path == RESPONSES_PATH else {_FIELD}
    if any(bytes(getattr(fields, name)) for name in dropped):
        kept = {key: value for key, value in top_level(body).items() if key not in dropped}
        body = msgspec.json.encode(kept)
    return msgspec.structs.replace(prompt, cache_salt=salt), _with_field(body, _FIELD, salt)


def owned(body: bytes, response_id: str | None) -> bytes:
    """The body of a request that makes a response, with the id that this shall have. One of the client's choice stays."""
    if response_id is None or (b"request_id" in body and bytes(decode(_FIELDS, body).request_id)):
        return body
    return _with_field(body, "request_id", response_id)


def _with_field(body: bytes, field: str, value: object) -> bytes:
    """A JSON object with one more field. It comes last: of equal keys, readers of JSON take the last one."""
    head = body.rstrip(b" \t\r\n")[:-1].rstrip(b" \t\r\n")
    comma = b"" if head.endswith(b"{") else b","
    return b'%b%b"%b":%b}' % (head, comma, field.encode(), msgspec.json.encode(value))


def _names_media(messages: msgspec.Raw) -> bool:
    """Whether messages, or lists of them, name media by ids of the client's choice: vLLM caches it under them for everybody.

    Messages with the word `uuid` and too many parts to look at count as if they did. Raises `InvalidRequest` if they cannot
    be read.
    """
    if not _may_name(text := bytes(messages)):
        return False
    if sum(map(text.count, (b"{", b"[", b","))) > _MOST_PARTS:
        return True
    found = [decode(_ANY, messages, "messages")]
    while found:
        each = found.pop()
        if isinstance(each, list):
            found.extend(each)
        elif isinstance(each, dict):
            if each.get("uuid") is not None:
                return True
            found.append(each.get("content"))
    return False


def _may_name(text: bytes) -> bool:
    """Whether a string of this JSON ends in `uuid`, piece by piece, so that other threads can run in between."""
    if b"\\u" not in text:  # nothing is escaped
        return b'uuid"' in text
    starts = range(0, len(text), _PIECE)
    return any(_UUID.search(text, start, start + _PIECE + _LONGEST_UUID) is not None for start in starts)


def isolating(pods: Sequence[Pod], path: str) -> list[Pod]:
    """The pods whose engines take a salt at `path`. Raises `NoPodAvailable` if no pod does."""
    able = [] if path in _UNSALTED else [pod for pod in pods if pod.engine != "sglang" or path in _SGLANG_PATHS]
    if not able:
        raise NoPodAvailable(f"{path} cannot keep tenants apart: the engine takes no cache salt there.")
    return able


_TOKENIZING = frozenset(("/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize"))


def is_salted(prompt: Prompt, body: bytes) -> bool:
    """Whether the engine may look into its cache for a request, so that it must carry a salt.

    Of those that bring no prompt to route by, that is whatever is not only tokenized: some of these paths take a prompt
    all the same. Uploads and questions about stored responses do not. Raises `InvalidRequest` if such a request is no
    JSON object: engines also read other encodings of JSON, which a salt could not be added to.
    """
    if not prompt.opaque:
        return True
    if prompt.response_id is not None or prompt.path in _TOKENIZING or not body or body.startswith(b"--"):
        return False
    decode(_FIELDS, body)
    return True
