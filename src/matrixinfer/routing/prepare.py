"""The first step of a decision: everything that awaits.

A request body becomes a prompt, token ids, block hashes and the matches of every endpoint. If token ids or the index are
not available, `Prepared.degraded` says so, and the request is routed without them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec
from msgspec.structs import replace

from matrixinfer.access.gate import Ticket
from matrixinfer.blocks import BlockChain, Medium, TokenBlockProcessor
from matrixinfer.errors import IndexUnavailable, NoPodAvailable, TokenizeError
from matrixinfer.pods.registry import Pod, PodRegistry
from matrixinfer.prompt.base import Prompt, Tokenized, Tokens
from matrixinfer.prompt.bounds import LARGE_BYTES
from matrixinfer.prompt.late import TokensLate
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.outline import Outline, media_kwargs
from matrixinfer.prompt.requests import Reader
from matrixinfer.prompt.responses import RESPONSES_PATH
from matrixinfer.routing.destinations import NO_HEADERS, Destination, Destinations
from matrixinfer.routing.isolation import is_salted, isolating, owned, salted
from matrixinfer.routing.lookup import Lookup, Matches
from matrixinfer.routing.prepared import Degraded, Prepared, Steps
from matrixinfer.routing.sizing import Sizer, Sizing
from matrixinfer.scheduler.framework import SchedulingRequest
from matrixinfer.telemetry.stages import Stages
from matrixinfer.trust.media import MediaNames
from matrixinfer.trust.parity import Parity

_PREFIX_KEPT = 64 * 1024
"""Bytes of a prompt that are kept for plugins until its answer ends."""


class Preparer:
    """Reads, tokenizes, hashes and looks up, the latter two for the first `max_prefix_tokens` tokens of a prompt."""

    def __init__(
        self,
        registry: PodRegistry,
        tokenizers: TokenizerManager,
        blocks: TokenBlockProcessor,
        lookup: Lookup,
        parity: Parity,
        sizer: Sizer,
        *,
        media: MediaNames | None = None,
        max_prefix_tokens: int,
        destinations: Destinations | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._tokenizers = tokenizers
        self._blocks = blocks
        self._lookup = lookup
        self._parity = parity
        self._sizer = sizer
        self._media = media
        self._max_blocks = max(1, max_prefix_tokens // blocks.block_size)
        self._destinations = destinations or Destinations(registry)
        self._clock = clock

    async def prepare(
        self,
        path: str,
        body: bytes,
        *,
        request_id: str,
        session: str | None = None,
        read: Reader | None = None,
        headers: Mapping[str, str] = NO_HEADERS,
        ticket: Ticket | None = None,
        stages: Stages | None = None,
    ) -> Prepared:
        """Prepare a request that came to `path`; `read` reads a body that brings no prompt. `stages` takes its steps.

        Raises `RequestError`, and `NoPodAvailable` when no pod serves it. `headers` may decide its route. `ticket` says
        which models it may ask for, and which cache salt keeps its tenant apart.
        """
        steps = Steps(self._clock, stages)
        with steps.step("parse"):
            prompt = await self._tokenizers.read(path, body, read)
            destination = await self._destinations.of(prompt, request_id, session, headers, ticket)
            if ticket is not None and ticket.isolates and is_salted(destination.prompt, body):
                destination, body = await _isolated(destination, body, path, ticket)
            if ticket is not None and path == RESPONSES_PATH and not destination.prompt.opaque:
                body = await _owned(body, ticket.new_response_id())
            prompt, model, pods, way = destination
        base_model = _base_model(model, pods)
        configured = self._registry.configured_name(base_model, pods)
        tokenized = None if prompt.opaque else await self._tokenize(prompt, configured, pods, steps)
        late: TokensLate | None = None
        if isinstance(tokenized, TokensLate):
            late, tokenized = tokenized, None
        tokenized, outline, media = self._with_media(prompt, model, body, tokenized)
        sizing = await self._size(prompt, model, tokenized, steps)
        chain: Sequence[int] = ()
        matches: Matches | None = None
        if tokenized is not None:
            chain, matches = await self._find(prompt, model, configured, pods, tokenized, steps, media)
        prefix = bytes(prompt.prefix[:_PREFIX_KEPT])
        prompt = prompt.without_content()
        ids = None if tokenized is None else tokenized.tokens.ids
        return Prepared(
            prompt=prompt,
            body=body,
            request=SchedulingRequest(
                id=request_id,
                model=model,
                prompt_tokens=None if ids is None else len(ids),
                block_size=self._blocks.block_size,
                chain=chain,
                prefix=prefix,
                session=session,
                adapter=None if base_model == model else model,
                streams=prompt.stream,
                now=self._clock(),
                unknown_tokens=sizing.unknown_tokens,
                other_tokens=sizing.other_tokens,
                chunks=sizing.hashes,
                chunk_ends=sizing.ends,
            ),
            pods=pods,
            matches=matches,
            base_model=base_model,
            ids=ids,
            tokenizer=configured if tokenized is not None and _is_comparable(tokenized) else None,
            sizing=sizing,
            degraded=steps.degraded,
            timings_ms=steps.timings_ms,
            outline=outline,
            late=late,
            way=way,
        )

    async def again(self, prepared: Prepared, *, waited: float, stages: Stages | None = None) -> Prepared:
        """The same request after it has `waited` so many seconds: the pods and the matches of now."""
        model, pods = self._destinations.again(prepared.prompt, prepared.way)
        if model != prepared.request.model:
            raise NoPodAvailable(f"The model `{prepared.prompt.model}` has changed while the request waited.")
        if prepared.way.isolates:
            pods = isolating(pods, prepared.prompt.path)
        steps = Steps(self._clock, stages)
        steps.timings_ms.update(prepared.timings_ms, queue=waited * 1000)
        steps.degraded.update({why: words for why, words in prepared.degraded.items() if why is not Degraded.INDEX})
        matches, chain = None, prepared.request.chain
        if isinstance(chain, BlockChain):
            with steps.step("match"):
                matches = await self._match(prepared.prompt, model, pods, chain, steps)
        return replace(
            prepared,
            pods=pods,
            matches=matches,
            request=replace(prepared.request, now=self._clock()),
            degraded=steps.degraded,
            timings_ms=steps.timings_ms,
        )

    def follow(self, prepared: Prepared, use: Callable[[Prepared], None]) -> None:
        """If the token ids are late, call `use` with the request that has them, when they come. They may never come."""

        async def complete(tokenized: Tokenized) -> None:
            steps = Steps(self._clock)
            steps.degraded.update(prepared.degraded)
            configured = self._registry.configured_name(prepared.base_model, prepared.pods)
            chain, matches = await self._find(
                prepared.prompt, prepared.request.model, configured, prepared.pods, tokenized, steps
            )
            ids = tokenized.tokens.ids
            request = replace(
                prepared.request, prompt_tokens=len(ids), chain=chain, unknown_tokens=0, now=self._clock()
            )
            use(
                replace(
                    prepared,
                    request=request,
                    matches=matches,
                    ids=ids,
                    tokenizer=configured if _is_comparable(tokenized) else None,
                    degraded=steps.degraded,
                    late=None,
                )
            )

        late = prepared.late
        if late is not None:
            prepared = prepared.without_body()
            late.then(complete)

    async def _tokenize(
        self, prompt: Prompt, model: str, pods: Sequence[Pod], steps: Steps
    ) -> Tokenized | TokensLate | None:
        began = self._clock()
        try:
            return await self._tokenizers.tokenize(prompt, model=model, engines=pods, may_be_late=True)
        except TokensLate as late:
            steps.degraded[Degraded.LATE] = f"token ids were not there in time: {late}"
            return late.with_traceback(None)  # whose frames hold the prompt and its body
        except TokenizeError as error:
            steps.degraded[Degraded.TOKENIZE] = f"not tokenized: {error}"
            return None
        finally:
            if steps.stages is not None:
                steps.stages.add("tokenize", began, self._clock())

    async def _find(
        self,
        prompt: Prompt,
        model: str,
        configured: str,
        pods: Sequence[Pod],
        tokenized: Tokenized,
        steps: Steps,
        media: Sequence[Medium] = (),
    ) -> tuple[BlockChain, Matches | None]:
        """The block hashes of a tokenized prompt with these media, and their matches."""
        steps.timings_ms.update(tokenized.tokens.timings_ms)
        self._note_limits(tokenized, configured, prompt.request_class, steps)
        with steps.step("match"):
            chain = self._chain(prompt, tokenized.tokens, media)
            return chain, await self._match(prompt, model, pods, chain, steps)

    async def _size(self, prompt: Prompt, model: str, tokenized: Tokenized | None, steps: Steps) -> Sizing:
        if prompt.opaque or not self._sizer.needs_bytes(tokenized):
            return self._sizer.plain(prompt, model)
        with steps.step("bytes"):
            return await self._sizer.cut(prompt, model, tokenized)

    def _note_limits(self, tokenized: Tokenized, model: str, request_class: str, steps: Steps) -> None:
        """Note where the token ids are only a part of the engine's, or are not to be believed."""
        if not tokenized.tokens.complete:
            known = len(tokenized.tokens.ids)
            steps.degraded[Degraded.MEDIA] = f"only the {known} tokens before the first image, audio or video are known"
        elif _is_comparable(tokenized) and self._parity.is_approximate(model, request_class):
            steps.degraded[Degraded.PARITY] = (
                f"token ids of {request_class} requests have differed from the engine's; only recent blocks count"
            )

    def _with_media(
        self, prompt: Prompt, model: str, body: bytes, tokenized: Tokenized | None
    ) -> tuple[Tokenized | None, Outline | None, Sequence[Medium]]:
        """The whole token ids of a prompt with media and these, where all are known; else its outline, if it has one."""
        outline = None if tokenized is None or tokenized.tokens.complete else tokenized.tokens.outline
        if tokenized is None or outline is None or self._media is None or media_kwargs(body):
            return tokenized, None, ()
        if prompt.keep_first is not None or prompt.keep_last is not None:
            return tokenized, None, ()
        whole = self._media.expand(model, outline)
        if whole is None:
            return tokenized, outline, ()
        tokens = msgspec.structs.replace(tokenized.tokens, ids=whole[0], complete=True, hashes=None)
        return msgspec.structs.replace(tokenized, tokens=tokens), None, whole[1]

    def _chain(self, prompt: Prompt, tokens: Tokens, media: Sequence[Medium]) -> BlockChain:
        return self._blocks.chain(
            tokens.ids,
            salt=prompt.cache_salt,
            media=media,
            max_blocks=self._max_blocks,
            hashes=None if prompt.cache_salt else tokens.hashes,
        )

    async def _match(
        self, prompt: Prompt, model: str, pods: Sequence[Pod], chain: BlockChain, steps: Steps
    ) -> Matches | None:
        if not prompt.reads_cache:
            return None  # the engine computes the whole prompt, so no pod is better than another
        try:
            return await self._lookup.match(model, prompt.model, pods, chain)
        except IndexUnavailable as error:
            steps.degraded[Degraded.INDEX] = f"index unavailable: {error}"
            return None


def _is_comparable(tokenized: Tokenized) -> bool:
    """Whether an engine may disagree with these ids: they are whole, and the client did not send them itself."""
    return tokenized.tokens.complete and tokenized.source != "request"


def _base_model(model: str, pods: Sequence[Pod]) -> str:
    """The model that tokenizes: for an adapter the one below it."""
    served = pods[0].served
    return served.base_model if served is not None and model in served.adapters else model


async def _isolated(destination: Destination, body: bytes, path: str, ticket: Ticket) -> tuple[Destination, bytes]:
    """The request with the salt of its tenant, at pods whose engines take one there."""
    prompt, model, pods, way = destination
    salt = ticket.salt(prompt.cache_salt)
    is_large = len(body) > LARGE_BYTES
    prompt, body = await asyncio.to_thread(salted, prompt, body, salt) if is_large else salted(prompt, body, salt)
    return Destination(prompt, model, isolating(pods, path), way._replace(isolates=True)), body


async def _owned(body: bytes, response_id: str | None) -> bytes:
    return await asyncio.to_thread(owned, body, response_id) if len(body) > LARGE_BYTES else owned(body, response_id)
