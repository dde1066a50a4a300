"""A model's tokenizer and chat template, run in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import gigatoken
import msgspec
import numpy as np
import structlog
import tokenizers
from msgspec.structs import replace

from matrixinfer.blocks import SharedHashes, TokenIds
from matrixinfer.errors import ConfigError, TokenizeError
from matrixinfer.prompt import encoders, tokenizer_files
from matrixinfer.prompt.base import Chat, Prompt, Tokens
from matrixinfer.prompt.bounds import TooMuch
from matrixinfer.prompt.cache import NO_TOKENS, CacheStats, TokenCache
from matrixinfer.prompt.chat_template import CHATML, RESERVED, ChatTemplate
from matrixinfer.prompt.conversation import engine_messages, engine_tools, has_media, without_developers
from matrixinfer.prompt.dialect import Dialect
from matrixinfer.prompt.effort import Abandoned
from matrixinfer.prompt.grown import Grown, not_rendered
from matrixinfer.prompt.multimodal import before_media, with_media
from matrixinfer.prompt.openai import COMPLETIONS_PATH
from matrixinfer.prompt.outline import Outline, contents_of
from matrixinfer.prompt.resuming import Rendering
from matrixinfer.prompt.segments import Cutter, cutter_of
from matrixinfer.prompt.sglang import sglang_chat, without_wrappers
from matrixinfer.prompt.template_traits import TemplateTraits, adapt, probe


class LocalTokenizer:
    """Renders chats and encodes text exactly as the engine does. Thread-safe."""

    def __init__(
        self,
        encoder: encoders.Encoder,
        *,
        before: TokenIds,
        after: TokenIds,
        templates: Mapping[str, ChatTemplate],
        cache: TokenCache,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._encoder = encoder
        self._before = before
        self._after = after
        self._templates = templates
        self._cache = cache
        self._clock = clock

    @classmethod
    def load(
        cls,
        path: Path,
        chat_template: str | None,
        *,
        where: str = "$.models[]",
        now: Callable[[], datetime] = datetime.now,
        block_size: int = 128,
        cache_bytes: int = 0,
    ) -> LocalTokenizer:
        """Load `tokenizer.json`, given as the file or as its folder. Takes seconds for large vocabularies.

        `chat_template` is `chatml`, a Jinja file, or None for the tokenizer's own. Up to `cache_bytes` of token ids
        are cached, with hashes of blocks of `block_size` tokens. Raises `ConfigError` below the key `where` of the
        model's configuration.
        """
        files = tokenizer_files.read(path, where=f"{where}.tokenizer")
        try:
            reference = tokenizers.Tokenizer.from_buffer(files.data)
            # The file's padding and truncation are meant for training batches, not for prompts.
            reference.no_padding()
            reference.no_truncation()
            around = encoders.added_around(reference)
            added = [token.content for _, token in sorted(reference.get_added_tokens_decoder().items())]
            encoder = encoders.choose(
                lambda: gigatoken.Tokenizer.from_json(files.data),
                encoders.Reference(reference),
                added,
                source=str(files.path),
            )
        except Exception as error:  # boundary: `tokenizers` raises bare Exception
            raise ConfigError(f"{where}.tokenizer", f"{files.path} is not a usable tokenizer: {error}") from error
        return cls.build(
            encoder,
            files,
            msgspec.json.decode(files.data),
            chat_template,
            around=around,
            where=where,
            now=now,
            block_size=block_size,
            cache_bytes=cache_bytes,
        )

    @classmethod
    def build(
        cls,
        encoder: encoders.Encoder,
        files: tokenizer_files.TokenizerFiles,
        description: Mapping[str, Any],
        chat_template: str | None,
        *,
        around: tuple[TokenIds, TokenIds],
        where: str,
        now: Callable[[], datetime],
        block_size: int,
        cache_bytes: int,
    ) -> LocalTokenizer:
        """Build the tokenizer from its parts. The other arguments are those of `load`.

        `description` has the form of a `tokenizer.json`; `around` are the ids added before and after a text.
        """
        sources = files.templates
        if chat_template is not None:
            sources = {"default": _configured(chat_template, where=f"{where}.chatTemplate")}
        try:
            templates = {
                name: ChatTemplate(source, now=now, aliases_reasoning=False, **files.special_tokens)
                for name, source in sources.items()
            }
        except TokenizeError as error:
            raise ConfigError(f"{where}.chatTemplate", str(error)) from error
        cutter = cutter_of(description, sources.values(), shortest=encoder.piece_chars)
        cutter = _verified(cutter, encoder, source=str(files.path))
        cache = TokenCache(encoder.encode_each, cutter, block_size=block_size, max_bytes=cache_bytes)
        before, after = around
        return cls(encoder, before=before, after=after, templates=templates, cache=cache)

    @property
    def name(self) -> str:
        """The library that encodes: `gigatoken` or `tokenizers`."""
        return self._encoder.name

    @property
    def cache_stats(self) -> CacheStats:
        """Counters and size of the token cache."""
        return self._cache.stats

    @property
    def inline_bytes(self) -> int:
        """Larger requests, in bytes, should be tokenized in a thread."""
        return self._encoder.inline_bytes

    def tokenize(self, prompt: Prompt, dialect: Dialect = Dialect.VLLM) -> Tokens:
        """See `Tokenizer.tokenize`."""
        timings: dict[str, float] = {}
        text, complete, continued = prompt.text, True, ""
        # SGLang's completions have no field for this.
        special = prompt.add_special_tokens or (dialect.is_sglang and prompt.path == COMPLETIONS_PATH)
        if prompt.chat is not None:
            start = self._clock()
            if dialect.is_sglang:  # raises where there are media
                text, continued = self.render_for_sglang(prompt.chat, dialect)
                special = False
            elif has_media(not_rendered(prompt.chat, Dialect.VLLM)):
                text, complete = self.render_before_media(prompt.chat, dialect), False
            else:
                text = self.render(prompt.chat, dialect)
            timings["render"] = (self._clock() - start) * 1e3
        if text is None:
            raise TokenizeError("the prompt is neither chat, text nor token ids")
        start = self._clock()
        ids, hashes = self._encode(text, before=special, after=special and complete)
        outline = None if complete or prompt.chat is None else self._outline(prompt.chat, dialect, special=special)
        if continued:
            ids = np.concatenate((ids, self._continued(continued)))
        timings["tokenize"] = (self._clock() - start) * 1e3
        return Tokens(
            ids=ids, complete=complete, outline=outline, hashes=None if continued else hashes, timings_ms=timings
        )

    def encode(self, text: str, *, add_special_tokens: bool) -> TokenIds:
        """The token ids of `text`, shape (n,), optionally with the special tokens around it. Raises `TokenizeError`."""
        return self._encode(text, before=add_special_tokens, after=add_special_tokens)[0]

    def render(self, chat: Chat, dialect: Dialect = Dialect.VLLM) -> str:
        """The chat's text as vLLM renders it. Raises `TokenizeError`."""
        if dialect is Dialect.VLLM_OLD and chat.sent is not None and chat.sent.reasoning_effort is not None:
            raise TokenizeError("what vLLM before 0.24 makes of a reasoning effort is not known here")
        template, chat = self._template(chat), self._adapted(chat)
        parts, in_schema_order = template.takes_parts(dialect), chat.in_schema_order
        shape = partial(engine_messages, parts=parts, in_schema_order=in_schema_order)
        if chat.rendered is None:
            messages = shape(chat.messages)
            return _rendered(template, chat, engine_tools(chat.tools), messages)
        grown = Grown(chat, Dialect.VLLM, template, parts, in_schema_order)
        messages, tools = grown.messages(lambda new: template.shaped(shape(new))), grown.tools(engine_tools)
        return grown.render(partial(_rendered, template, chat, tools, messages, is_shaped=True))

    def render_before_media(self, chat: Chat, dialect: Dialect = Dialect.VLLM) -> str:
        """The text that certainly precedes the first image, audio or video, cut at a token boundary.

        Raises `TokenizeError`.
        """
        template, chat = self._template(chat), self._adapted(chat)
        text = before_media(
            chat, partial(_rendered, template, chat, engine_tools(chat.tools)), parts=template.takes_parts(dialect)
        )
        return self._cache.cutter.settled(text)

    def render_with_media(self, chat: Chat, dialect: Dialect = Dialect.VLLM) -> str:
        """The chat's text with what the template writes for images, audio and video. Raises `TokenizeError`."""
        template, chat = self._template(chat), self._adapted(chat)
        if not template.takes_parts(dialect):
            raise TokenizeError("the chat template takes no images, audio or video")
        return with_media(chat, partial(_rendered, template, chat, engine_tools(chat.tools)))

    def _outline(self, chat: Chat, dialect: Dialect, *, special: bool) -> Outline | None:
        """The whole chat with its placeholders; None where it is not known which those are, or what the media are."""
        contents = None if dialect.is_sglang else contents_of(chat)
        if contents is None:
            return None
        try:
            text = self.render_with_media(chat, dialect)
        except TokenizeError:
            return None
        return Outline(ids=self._encode(text, before=special, after=special)[0], contents=contents)

    def template_of(self, chat: Chat) -> ChatTemplate:
        """The template that renders `chat`. Raises `TokenizeError`."""
        return self._template(chat)

    def render_for_sglang(self, chat: Chat, dialect: Dialect) -> tuple[str, str]:
        """The chat's text as SGLang renders it, and the text to continue, encoded separately. Raises `TokenizeError`."""
        if len(self._templates) > 1:
            raise TokenizeError(
                "the tokenizer has several chat templates; set `chatTemplate` to the one that SGLang uses"
            )
        template = self._template(replace(chat, chat_template=None))
        grown = Grown(chat, dialect, template)
        shaped = sglang_chat(chat, dialect, grown, parts=template.takes_parts(dialect))  # has no nulls
        variables = dict(shaped.variables)
        documents = variables.pop("documents", None)
        write = partial(template.render_shaped, shaped.messages, documents=documents, variables=variables)
        try:
            text = grown.render(partial(write, tools=shaped.tools))
        except TokenizeError:
            if not shaped.tools:
                raise
            text = write(tools=without_wrappers(shaped.tools))
        return text, shaped.continued

    def _continued(self, text: str) -> TokenIds:
        """The ids of a text to continue, as SGLang appends them to the prompt: without the BOS token."""
        ids, _ = self._encode(text, before=True, after=True)
        return ids[1:] if len(ids) and ids[0] == self._bos else ids

    def decode(self, ids: TokenIds) -> bytes:
        """The bytes that token ids encode, including special tokens. Raises `TokenizeError` for unknown ids."""
        try:
            return self._encoder.decode(ids)
        except Exception as error:  # boundary: `tokenizers` raises bare Exception
            raise TokenizeError(f"{self.name} could not decode the ids: {type(error).__name__}") from error

    def _encode(self, text: str, *, before: bool, after: bool) -> tuple[TokenIds, SharedHashes]:
        try:
            return self._cache.encode(
                text, before=self._before if before else NO_TOKENS, after=self._after if after else NO_TOKENS
            )
        except (encoders.NeedsThread, Abandoned, TooMuch):
            raise
        except Exception as error:  # boundary: `tokenizers` raises bare Exception
            raise TokenizeError(f"{self.name} could not encode the prompt: {type(error).__name__}") from error

    def _adapted(self, chat: Chat) -> Chat:
        return adapt(chat, self._traits) if chat.joins_system or chat.thinking_off else chat

    @cached_property
    def _traits(self) -> TemplateTraits:
        return probe((template.source for template in self._templates.values()), self.render)

    @cached_property
    def _bos(self) -> int | None:
        """The id of the BOS token; None if there is none."""
        token = next((each.bos_token for each in self._templates.values()), None)
        ids = NO_TOKENS if token is None else self._encode(token, before=False, after=False)[0]
        return int(ids[0]) if len(ids) == 1 else None

    def _template(self, chat: Chat) -> ChatTemplate:
        if chat.own_template:
            raise TokenizeError("the request supplies its own chat template")
        names = ("tool_use", "default") if chat.tools is not None else ("default",)
        for name in names:
            if name in self._templates:
                return self._templates[name]
        raise TokenizeError("the tokenizer has no chat template; set `chatTemplate` of the model")


def _rendered(
    template: ChatTemplate,
    chat: Chat,
    tools: list[dict[str, Any]] | None,
    messages: list[dict[str, Any]],
    *,
    is_shaped: bool = False,
    rendering: Rendering | None = None,
) -> str:
    """Render engine messages and tools. With `is_shaped`, the template has shaped the messages already."""
    sent = chat.chat_template_kwargs or {}
    messages = messages if template.knows_developers else without_developers(messages)
    return template.render_shaped(
        messages if is_shaped else template.shaped(messages),
        tools,
        sent.get("documents") if chat.documents is None else chat.documents,
        add_generation_prompt=chat.add_generation_prompt,
        continue_final_message=chat.continue_final_message,
        variables={key: value for key, value in sent.items() if key not in RESERVED},
        rendering=rendering,
    )


def _verified(cutter: Cutter, encoder: encoders.Encoder, *, source: str) -> Cutter:
    """`cutter` if cutting does not change the ids of a sample, else a cutter that never cuts."""
    block = "\nLine ".join(encoders.TRICKY_TEXTS) * (1 + encoder.piece_chars // 500)
    sample = block.join(("", *cutter.tokens, "", "\n", ""))
    if encoders.agree(encoder.encode, lambda text: np.concatenate(encoder.encode_each(cutter.cut(text))), sample):
        return cutter
    structlog.get_logger(__name__).warning("tokenizer_cutting_disabled", tokenizer=source)
    return Cutter()


def _configured(chat_template: str, *, where: str) -> str:
    return CHATML if chat_template == "chatml" else tokenizer_files.read_text(Path(chat_template), where=where)
