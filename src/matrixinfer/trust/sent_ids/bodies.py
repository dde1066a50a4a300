"""Bodies that hand a prompt's token ids to an engine, which then neither renders nor tokenizes the prompt. Pure.

Only what can depend on nothing but the ids is handed over: plain chats and texts, with fields that shape how tokens are
chosen or returned. Everything that an engine may read the messages or the text for, such as tools, parsers, formats,
`echo` or log-probabilities, is left to it, and so is every field that is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec
from msgspec import Raw

from matrixinfer.blocks import TokenIds
from matrixinfer.errors import UNREADABLE, InvalidRequest
from matrixinfer.pods.engine_kind import EngineKind
from matrixinfer.prompt.fields import top_level
from matrixinfer.prompt.openai import CHAT_PATH, COMPLETIONS_PATH

CLASSES: Mapping[str, str] = MappingProxyType({CHAT_PATH: "chat", COMPLETIONS_PATH: "text"})
"""The paths whose engines take token ids, and the class of their plain requests."""

_SHAPING = frozenset(
    (
        *("model", "stream", "stream_options", "user", "priority", "cache_salt", "n", "seed", "temperature", "top_p"),
        *("top_k", "min_p", "max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "frequency_penalty"),
        *("presence_penalty", "repetition_penalty", "logit_bias", "include_stop_str_in_output", "skip_special_tokens"),
        "spaces_between_special_tokens",
    )
)
"""Fields that matter for the answer, if at all, in the same way whether the engine got a text or token ids."""
_FIELDS: Mapping[str, frozenset[str]] = MappingProxyType(
    {CHAT_PATH: _SHAPING | {"messages", "max_completion_tokens"}, COMPLETIONS_PATH: _SHAPING | {"prompt"}}
)
_LIMITS = ("max_tokens", "max_completion_tokens")
_COUNT = msgspec.json.Decoder(int)
_NULL = b"null"
_SLICE = 8192


def takes_ids(path: str, engine: EngineKind | None) -> bool:
    """Whether engines of that kind have a field for token ids at that path."""
    return path in _FIELDS and engine in ("vllm", "sglang")


def with_ids(path: str, engine: EngineKind | None, body: bytes, ids: TokenIds, context_length: int) -> bytes | None:
    """The body with these token ids of its prompt; None if the engine must get the body as it is.

    That is so for every field that is not known not to matter, and for prompts that exceed the context of the engine
    together with the reply: it refuses those in words that depend on how it got them.
    """
    if not takes_ids(path, engine):
        return None
    try:
        fields = top_level(body)
        if any(name not in _FIELDS[path] and bytes(value) != _NULL for name, value in fields.items()):
            return None
        limits = [_COUNT.decode(fields[name]) for name in _LIMITS if bytes(fields.get(name, _NULL)) != _NULL]
    except (InvalidRequest, *UNREADABLE):
        return None
    if len(ids) + max((1, *limits)) > context_length:
        return None
    name, value = _field(path, engine, ids)
    return msgspec.json.encode({**fields, name: value})


def _field(path: str, engine: EngineKind | None, ids: TokenIds) -> tuple[str, Raw]:
    """The field that carries token ids. A text is replaced; a chat keeps its messages, which engines require."""
    array = _json(ids)
    if path == COMPLETIONS_PATH:
        return "prompt", Raw(array)
    if engine == "sglang":
        return "input_ids", Raw(array)
    return "kv_transfer_params", Raw(b'{"prompt_token_ids":%b}' % array)


def _json(ids: TokenIds) -> bytes:
    """A JSON array, made piece by piece so that other threads can run in between."""
    pieces = (msgspec.json.encode(ids[at : at + _SLICE].tolist())[1:-1] for at in range(0, len(ids), _SLICE))
    return b"[%b]" % b",".join(pieces)
