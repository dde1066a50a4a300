"""How large a prompt is, and by which bytes it can be recognised, where its token ids do not say it."""

from __future__ import annotations

import asyncio
from collections.abc import Container, Sequence
from typing import NamedTuple

from matrixinfer.prompt.base import Prompt, Tokenized
from matrixinfer.traffic.byte_chunks import CHUNK_BYTES, MOST_CHUNKS, Chunks, cut
from matrixinfer.traffic.prompt_sizes import BYTES_PER_TOKEN, PromptSizes, Rates

_INLINE_BYTES = 1024 * 1024
"""A longer prompt is cut into chunks in a thread: images may have many megabytes."""


class Sizing(NamedTuple):
    """The bytes of a prompt, as far as they are needed, and the estimates of `SchedulingRequest`."""

    chunks: Chunks | None
    """None if all token ids are known, and nobody asks for more."""
    known: int
    """Known token ids."""
    known_bytes: int
    """Bytes of text that these stand for."""
    unknown_tokens: int
    ends: Sequence[int]
    other_tokens: int

    @property
    def hashes(self) -> Sequence[int]:
        """The hashes of the chunks."""
        return () if self.chunks is None else self.chunks.hashes


class Sizer:
    """Cuts prompts into chunks and estimates them, and learns from answers how large they were.

    Chunks are for the first `max_tokens` tokens, about. With `reads_bytes` prompts are cut even if all ids are known.
    """

    def __init__(self, *, max_tokens: int, reads_bytes: bool = False) -> None:
        self.sizes = PromptSizes()
        self.reads_bytes = reads_bytes
        self._max_chunks = min(MOST_CHUNKS, max(1, round(max_tokens * BYTES_PER_TOKEN) // CHUNK_BYTES))

    def needs_bytes(self, tokenized: Tokenized | None) -> bool:
        """Whether a prompt is recognised by its bytes: here, or on the next turn, when an engine's ids may be missing."""
        if tokenized is None or not tokenized.tokens.complete:
            return True
        return self.reads_bytes or tokenized.source == "remote"

    def plain(self, prompt: Prompt, model: str) -> Sizing:
        """Size a prompt whose token ids say all."""
        return Sizing(None, 0, 0, 0, (), self._others(prompt, self.sizes.of(model)))

    async def cut(self, prompt: Prompt, model: str, tokenized: Tokenized | None) -> Sizing:
        """Cut and estimate a prompt, of which `tokenized` is known."""
        rates = self.sizes.of(model)
        if len(prompt.prefix) <= _INLINE_BYTES:
            chunks = self._cut(prompt)
        else:
            chunks = await asyncio.get_running_loop().run_in_executor(None, self._cut, prompt)
        known, known_bytes, unknown = _parts(prompt, chunks, tokenized, rates)
        return Sizing(
            chunks, known, known_bytes, unknown, rates.ends(chunks, known, known_bytes), self._others(prompt, rates)
        )

    def learn(self, model: str, prompt: Prompt, sizing: Sizing, tokens: int) -> None:
        """An answer counts `tokens` in a prompt."""
        if prompt.token_ids is not None or not prompt.counted:
            return
        chunks = sizing.chunks
        if chunks is None:  # all of it is text
            self.sizes.learn(model, tokens, text_bytes=prompt.prefix_bytes, media={})
        elif not chunks.media:
            self.sizes.learn(model, tokens, text_bytes=chunks.text_bytes, media={})
        elif sizing.unknown_tokens:
            text = chunks.text_bytes - sizing.known_bytes
            self.sizes.learn(model, tokens, text_bytes=text, known=sizing.known, media=chunks.media)

    def keep_models(self, models: Container[str]) -> None:
        """Forget models that are not among `models`."""
        self.sizes.keep_models(models)

    def _others(self, prompt: Prompt, rates: Rates) -> int:
        return prompt.more_tokens + (rates.tokens(prompt.more_bytes, {}) if prompt.more_bytes else 0)

    def _cut(self, prompt: Prompt) -> Chunks:
        is_text = prompt.text is not None or prompt.token_ids is not None
        return cut(prompt.prefix, salt=prompt.cache_salt, has_media=not is_text, most=self._max_chunks)


def _parts(prompt: Prompt, chunks: Chunks, tokenized: Tokenized | None, rates: Rates) -> tuple[int, int, int]:
    """The known tokens, the bytes of text that they stand for, and the estimated tokens of the rest."""
    known = 0 if tokenized is None else len(tokenized.tokens.ids)
    if tokenized is None:
        known_bytes = 0
    elif tokenized.tokens.complete:
        return known, chunks.text_bytes, 0
    elif chunks.media:
        known_bytes = chunks.before_media
    else:  # what is unknown was not recognised as a medium
        known_bytes = min(chunks.text_bytes, round(known * rates.bytes_per_token))
    unknown = rates.tokens(chunks.text_bytes - known_bytes, chunks.media)
    keep = prompt.keep_last or prompt.keep_first
    return known, known_bytes, unknown if keep is None else min(unknown, max(0, keep - known))
