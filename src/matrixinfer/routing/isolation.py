"""Keeps tenants apart in the engines' caches: the salt goes into the body, and only to engines that take it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from matrixinfer.errors import InvalidRequest, NoPodAvailable
from matrixinfer.pods.registry import Pod
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.fields import decode
from matrixinfer.prompt.openai import CHAT_PATH, COMPLETIONS_PATH
from matrixinfer.prompt.responses import RESPONSES_PATH

_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
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


def salted(prompt: Prompt, body: bytes, salt: str | None) -> tuple[Prompt, bytes]:
    """The prompt with this salt, and the body with it in place of the client's own.

    Raises `InvalidRequest` if the request asks for what an engine has computed for somebody else, past the salt.
    """
    fields = decode(_FIELDS, body)
    for name in _PAST_THE_SALT & fields.keys():
        if bytes(fields[name]) != b"null":
            raise InvalidRequest(f"`{name}` cannot be used where tenants are kept apart.", param=name)
    if _names_media(fields.get("messages")):
        raise InvalidRequest("`uuid` of media cannot be used where tenants are kept apart.", param="messages")
    dropped = {_FIELD, "request_id"} if prompt.path == RESPONSES_PATH else {_FIELD}
    if dropped & fields.keys():
        body = msgspec.json.encode({key: value for key, value in fields.items() if key not in dropped})
    return msgspec.structs.replace(prompt, cache_salt=salt), _with_field(body, _FIELD, salt)


def owned(body: bytes, response_id: str | None) -> bytes:
    """The body of a request that makes a response, with the id that this shall have. One of the client's choice stays."""
    if response_id is None or (b"request_id" in body and "request_id" in decode(_FIELDS, body)):
        return body
    return _with_field(body, "request_id", response_id)


def _with_field(body: bytes, field: str, value: object) -> bytes:
    """A JSON object with one more field. It comes last: of equal keys, readers of JSON take the last one."""
    head = body.rstrip(b" \t\r\n")[:-1].rstrip(b" \t\r\n")
    comma = b"" if head.endswith(b"{") else b","
    return b'%b%b"%b":%b}' % (head, comma, field.encode(), msgspec.json.encode(value))


def _names_media(messages: msgspec.Raw | None) -> bool:
    """Whether messages, or lists of them, name media by ids of the client's choice: vLLM caches it under them for everybody.

    Raises `InvalidRequest` if that cannot be read.
    """
    if messages is None or not any(part in bytes(messages) for part in (b"uuid", b"\\u")):  # keys may be escaped
        return False
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
