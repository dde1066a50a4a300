"""Prompts, tokens and the tokenizer protocol.

One module per API reads a `Prompt` from a request's body. A `Tokenizer` turns a `Prompt` into `Tokens`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, TypeAlias

from msgspec import Meta, Struct, field
from msgspec.structs import replace

from matrixinfer.blocks import SharedHashes, TokenIds
from matrixinfer.prompt.dialect import Dialect
from matrixinfer.prompt.outline import Outline

TokenId = Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]

Rendered: TypeAlias = dict[tuple[Dialect, Hashable], Any]
"""What was made of a chat, by kind of engine, and by template and the like; see `grown`."""


class SentFields(Struct, frozen=True, kw_only=True, eq=False):
    """Fields of a chat as the client sent them, which SGLang reads differently from vLLM."""

    template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | float | None = None
    reasoning: object = None
    tool_choice: object = None
    input_ids: TokenIds | None = None
    """The prompt's token ids. SGLang uses them in place of the messages; vLLM ignores them."""


class Chat(Struct, frozen=True, kw_only=True, eq=False):
    """The input of a chat template."""

    messages: list[dict[str, Any]]
    """As the client sent them: plain dicts with keys in the client's order. Never empty."""
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    """A template that the request supplies. Only the engine renders it, never this process."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the template, including those that are set from other request fields."""
    in_schema_order: bool = True
    """False when the engine builds the messages itself: its schema then does not reorder the keys of tool calls."""
    joins_system: bool = False
    """Later system messages are merged into the first one if the template refuses them; see `template_traits.adapt`."""
    thinking_off: bool = False
    """Thinking is disabled by a value that not every template knows; see `template_traits.adapt`."""

    sent: SentFields | None = None
    """None in APIs whose chats only vLLM builds in a way that is known here."""
    rendered: Rendered | None = None
    """Where its renderings are kept. At first it has those of the chat that this one continues. None if none are kept."""

    @property
    def own_template(self) -> bool:
        """True when the request supplies its own template."""
        return self.chat_template is not None


class Prompt(Struct, frozen=True, kw_only=True, eq=False):
    """A request's prompt. Exactly one of `chat`, `text`, `token_ids` and `inexact` is set, until it is tokenized."""

    path: str
    model: str
    """The model that the request names; if it names none, "" until it is given the one that is served."""
    stream: bool
    chat: Chat | None
    text: str | None
    token_ids: TokenIds | None
    add_special_tokens: bool
    """Whether the tokenizer adds its own special tokens such as BOS. Chat templates write them themselves."""
    cache_salt: str | None
    size: int
    """Size of the request body, in bytes, without the media and the token ids that were not decoded."""
    prefix: bytes | memoryview
    """The prompt as the client sent it, for approximate matching without tokens: the JSON of tools and messages, the
    text in UTF-8, or the JSON of the token ids. Empty when the engine does not compute the prompt. A view into the body
    where that spares a large copy."""
    prefix_bytes: int = 0
    """Its length, which stays known when the prompt's content is dropped."""
    inexact: str | None = None
    """Why the token ids cannot be derived from the request, such as state that the engine keeps."""
    keep_last: int | None = None
    """The engine keeps only this many tokens from the prompt's end. Never 0."""
    keep_first: int | None = None
    """The engine keeps only this many tokens from the prompt's beginning. Never 0."""
    reads_cache: bool = True
    """False when the engine ignores its cache and computes the whole prompt, as for log-probabilities of the prompt."""
    more_bytes: int = 0
    """Bytes of the request's other prompts, which the engine computes as well."""
    more_tokens: int = 0
    """Tokens of the request's other prompts, if these are token ids."""
    request_class: str = "text"
    """What the canary judges together; see `request_class`."""
    asked: str | None = None
    """The model that the client asked for, where a route has replaced it by `model`."""
    user: str | None = None
    """Whom the client names as the user behind the request."""
    names_model: bool = True
    """False when the body names no model."""
    names_surely: bool = True
    """False when an engine may read the name of another model in the request than the gateway does."""
    opaque: bool = False
    """The request brings no prompt to route by: it is routed by load, and the engine gets it as it is."""
    response_id: str | None = None
    """A response that an engine stores, and that the request continues or is about: only that engine can answer."""
    counted: bool = True
    """False when the engine's reported usage is not for this prompt alone: it has more prompts, or truncates this one."""
    claim: object = None
    """Lives as long as the decoded content: the memory that it counts is given back with it."""

    def without_content(self) -> Prompt:
        """The same without what was decoded, for the time until the answer ends. Only token ids remain."""
        claim = None if self.token_ids is None else self.claim
        return replace(self, chat=None, text=None, prefix=b"", claim=claim)


class Tokens(Struct, frozen=True, kw_only=True, eq=False):
    """A prompt's token ids, shape (n,)."""

    ids: TokenIds
    complete: bool = True
    """False when `ids` cover only the text before the first image, audio or video."""
    outline: Outline | None = None
    """What is known of the whole prompt where `ids` are only a part."""
    hashes: SharedHashes | None = None
    """Hashes of the first blocks, known from earlier prompts that began with the same ids, without a cache salt. Code
    that hashes further blocks extends this list in place, so later prompts reuse them. None if there is no cache."""
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds per step that ran in this process: `render` (the chat template) and `tokenize`."""


class Tokenized(Struct, frozen=True, kw_only=True, eq=False):
    """A prompt's tokens, and where they come from: the request itself, this process or an engine."""

    tokens: Tokens
    source: Literal["request", "local", "remote"]


class Tokenizer(Protocol):
    """A model's tokenizer and chat template, run in this process. Thread-safe."""

    @property
    def name(self) -> str:
        """The library that produces the ids, for logs and metrics."""
        ...

    @property
    def inline_bytes(self) -> int:
        """Largest request, in bytes, that is fast enough to tokenize on the event loop."""
        ...

    def tokenize(self, prompt: Prompt, dialect: Dialect = Dialect.VLLM) -> Tokens:
        """The ids that engines of `dialect` cache for `prompt`, whose `token_ids` is None. Raises `TokenizeError`.

        Does not truncate: the caller applies `keep_first` and `keep_last`.
        """
        ...


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The first position where two prompts' ids differ (the end of the shorter one counts), or None if they are equal."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    end = None if len(ours) == len(theirs) else min(len(ours), len(theirs))
    return next((i for i, (one, other) in pairs if one != other), end)
