"""What a request asks of a model, and what a tokenizer makes of it.

`Prompt` is read from a request's body by one module per API; `Tokenizer` is what every implementation of a model's
tokenizer offers; `Tokens` is what it returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

from msgspec import Meta

from matrixinfer.blocks import SharedHashes, TokenIds

TokenId = Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chat:
    """What a chat template is given."""

    messages: list[dict[str, Any]]
    """As sent: plain dicts, keys in the client's order. Never empty."""
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    """A template that the request brings along. It is the engine's to render, never ours."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the template, those that request fields stand for among them."""
    in_schema_order: bool = True
    """False when the engine makes the messages itself, so that its schema puts no keys of tool calls in order."""
    joins_system: bool = False
    """Later system messages join the first one where the template refuses them; see `fit.fitted`."""
    thinking_off: bool = False
    """Thinking was declined in words that not every template knows; see `fit.fitted`."""

    @property
    def own_template(self) -> bool:
        """True when the request brings its own template."""
        return self.chat_template is not None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """What a request asks of a model: exactly one of `chat`, `text`, `token_ids` and `inexact` is set."""

    path: str
    model: str
    stream: bool
    chat: Chat | None
    text: str | None
    token_ids: TokenIds | None
    add_special_tokens: bool
    """Whether the tokenizer adds its own special tokens such as BOS. Chat templates write theirs."""
    cache_salt: str | None
    size: int
    """Bytes of the whole request body."""
    prefix: bytes
    """The prompt as the client sent it, to match approximately without tokens: the JSON of tools and messages, the
    text in UTF-8, or the JSON of the token ids. Empty when the engine will not compute it."""
    inexact: str | None = None
    """Why the token ids do not follow from the request, such as state that the engine keeps."""
    keep_last: int | None = None
    """The engine drops all but this many tokens at the prompt's end. Never 0."""
    keep_first: int | None = None
    """The engine drops all but this many tokens at the prompt's beginning. Never 0."""
    reads_cache: bool = True
    """False when the engine computes the whole prompt whatever it has cached, as for log-probabilities of the prompt."""
    counted: bool = True
    """False when the engine's usage counts other tokens than these: of further prompts, or of a prompt cut to fit."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """A prompt's token ids, shape (n,)."""

    ids: TokenIds
    complete: bool = True
    """False when they are only the beginning: what comes before the first image, audio or video."""
    hashes: SharedHashes | None = None
    """Hashes of the first blocks, where earlier prompts began with the same ids. Whoever hashes further blocks extends
    the list in place, for prompts to come; it is that of prompts without a cache salt. None: nothing is remembered."""
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds of each step that ran here: `render` (the chat template) and `tokenize`."""


class Tokenizer(Protocol):
    """A model's tokenizer and chat template, run in this process. Safe to use from several threads."""

    @property
    def name(self) -> str:
        """The library that makes the ids, for logs and metrics."""
        ...

    @property
    def inline_bytes(self) -> int:
        """Requests up to this size take so little time that they need no thread."""
        ...

    def tokenize(self, prompt: Prompt) -> Tokens:
        """The ids that the engine caches for `prompt`, whose `token_ids` is None. Raises `TokenizeError`.

        `keep_last` is left to the caller.
        """
        ...


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The first position where two prompts' ids differ, which may be the shorter one's end; None where none does."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    end = None if len(ours) == len(theirs) else min(len(ours), len(theirs))
    return next((i for i, (one, other) in pairs if one != other), end)
