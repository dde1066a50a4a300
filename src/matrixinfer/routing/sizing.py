"""How large a prompt is, and by which bytes it can be recognised, where its token ids do not say it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matrixinfer.prompt.base import Prompt
from matrixinfer.traffic.byte_chunks import Chunks, cut
from matrixinfer.traffic.prompt_sizes import PromptSizes, Rates


class Sizing(NamedTuple):
    """The bytes of a prompt, as far as they are needed, and the estimates of `SchedulingRequest`."""

    chunks: Chunks | None
    known: int
    """Known token ids."""
    known_bytes: int
    """Bytes of text that these stand for."""
    unknown_tokens: int
    ends: Sequence[int]


def cut_prompt(prompt: Prompt, most: int) -> Chunks:
    """The chunks of a prompt's bytes."""
    is_text = prompt.text is not None or prompt.token_ids is not None
    return cut(prompt.prefix, salt=prompt.cache_salt, has_media=not is_text, most=most)


def sized(prompt: Prompt, chunks: Chunks, rates: Rates, *, known: int | None, is_whole: bool) -> Sizing:
    """Estimate what is not known. `known` token ids are the whole prompt (`is_whole`), its beginning, or None at all."""
    if is_whole and known is not None:
        known_bytes = chunks.text_bytes
        return Sizing(chunks, known, known_bytes, 0, rates.ends(chunks, known, known_bytes))
    if known is None:
        known, known_bytes = 0, 0
    elif chunks.media:
        known_bytes = chunks.before_media
    else:  # what is unknown was not recognised as a medium
        known_bytes = min(chunks.text_bytes, round(known * rates.bytes_per_token))
    unknown = rates.tokens(chunks.text_bytes - known_bytes, chunks.media)
    keep = prompt.keep_last or prompt.keep_first
    if keep is not None:
        unknown = min(unknown, max(0, keep - known))
    return Sizing(chunks, known, known_bytes, unknown, rates.ends(chunks, known, known_bytes))


def learn(sizes: PromptSizes, model: str, prompt: Prompt, sizing: Sizing, tokens: int) -> None:
    """An answer counts `tokens` in a prompt: learn from it how many tokens bytes and media are."""
    if prompt.token_ids is not None or not prompt.counted or not prompt.prefix:
        return
    chunks = sizing.chunks
    if chunks is None:  # all of it is text
        sizes.learn(model, tokens, text_bytes=len(prompt.prefix), media={})
    elif chunks.media and sizing.unknown_tokens:
        text = chunks.text_bytes - sizing.known_bytes
        sizes.learn(model, tokens, text_bytes=text, known=sizing.known, media=chunks.media)
    elif not chunks.media:
        sizes.learn(model, tokens, text_bytes=chunks.text_bytes, media={})


NOT_NEEDED = Sizing(None, 0, 0, 0, ())
"""All token ids are known, and no plugin asks for more."""
