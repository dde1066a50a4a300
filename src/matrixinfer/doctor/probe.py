"""Sends a new prompt twice to one endpoint: its events must predict how much of the second is found in the cache."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from dataclasses import dataclass

import aiohttp
import msgspec

from matrixinfer.blocks import BlockChain, TokenBlockProcessor, TokenIds
from matrixinfer.config.endpoint_names import EndpointName
from matrixinfer.doctor.event_listener import EventListener
from matrixinfer.doctor.facts import ProbeFacts
from matrixinfer.errors import MatrixInferError, TokenizeError, client_error
from matrixinfer.gateway.headers import RANK
from matrixinfer.gateway.rewrite import pin_rank
from matrixinfer.gateway.usage import usage
from matrixinfer.index.redis.fit import HEAD_TOKENS
from matrixinfer.kvevents.witness import Witness
from matrixinfer.pods.engine_api import EngineApi, EngineDown, OutOfResources
from matrixinfer.pods.registry import Endpoint, PodRegistry
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.openai import COMPLETIONS_PATH
from matrixinfer.routing.lookup import Lookup
from matrixinfer.scheduler.framework import Candidate
from matrixinfer.trust.cache_views import FeedCaches

BLOCKS = 3
"""Blocks that a probe fills, of the larger of the engine's and the gateway's block size."""
MAX_TOKENS = 32_768
"""Maximum length of a probe."""
ANSWER_SECONDS = 60.0
"""How long the engine may take for a probe, which may have to wait for other requests."""
METRICS_SECONDS = 1.0
"""How long the engine's hit counter may lag behind an answer."""
_POLL_SECONDS = 0.05
_WORDS = ("the", "river", "of", "stone", "and", "light", "in", "water", "over", "time", "with", "wind", "from", "snow")


class ProbeFailed(MatrixInferError):
    """The engine did not compute the probe, for the reason given."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProbePrompt:
    """The prompt of a probe, as the gateway sees it."""

    body: bytes
    ids: TokenIds
    chain: BlockChain


class Prober:
    """Probes endpoints. Waits `patience` seconds for events to arrive."""

    def __init__(
        self,
        *,
        session: aiohttp.ClientSession,
        api: EngineApi,
        tokenizers: TokenizerManager,
        registry: PodRegistry,
        blocks: TokenBlockProcessor,
        patience: float,
    ) -> None:
        self._session = session
        self._api = api
        self._tokenizers = tokenizers
        self._registry = registry
        self._blocks = blocks
        self._patience = patience

    async def probe(
        self, endpoint: Endpoint, model: str, listener: EventListener, engine_block: int | None
    ) -> ProbeFacts:
        """Send a new prompt twice to an endpoint, and report what its events predicted and what the engine found."""
        try:
            prompt = await self._new_prompt(endpoint, model, engine_block)
            witness = Witness(model, prompt.ids, prompt.chain, held=0, block_size=self._blocks.block_size)
            ledger = listener.publishers[endpoint.name].feed.ledger
            ledger.observe(witness)
            await self._send(endpoint, prompt)
            predicted = await self._predicted_hit(endpoint, model, listener, prompt)
            ledger.stop_observing(witness)
            published_by = None if predicted else await self._other_publisher(endpoint, model, listener, prompt)
            before = await self._hits(endpoint)
            cached = await self._send(endpoint, prompt)
            hits = await self._hits_since(endpoint, before, predicted)
        except ProbeFailed as error:
            return ProbeFacts(failure=str(error))
        return ProbeFacts(
            tokens=len(prompt.ids),
            predicted=predicted,
            cached=cached,
            hits=hits,
            first_difference=witness.first_difference if witness.chains == 1 else None,
            published_by=published_by,
            prompt=prompt.chain.head(HEAD_TOKENS),
        )

    async def _new_prompt(self, endpoint: Endpoint, model: str, engine_block: int | None) -> ProbePrompt:
        """A prompt that nobody has sent before, tokenized as the gateway would. Raises `ProbeFailed`."""
        served = endpoint.pod.served
        length = None if served is None else served.context_length
        words = min(BLOCKS * max(self._blocks.block_size, engine_block or 1) + 8, MAX_TOKENS)
        if length is not None:
            words = min(words, length // 2)  # a word may have more than one token
        random_words = random.choices(_WORDS, k=words)  # noqa: S311 - must be unique, protects nothing
        text = " ".join((uuid.uuid4().hex, *random_words))
        body = msgspec.json.encode({"model": model, "prompt": text, "max_tokens": 1, "temperature": 0})
        try:
            read = await self._tokenizers.read(COMPLETIONS_PATH, body)
            configured = self._registry.configured_name(model, [endpoint.pod])
            tokenized = await self._tokenizers.tokenize(read, model=configured, engines=[endpoint.pod])
        except TokenizeError as error:
            raise ProbeFailed(f"the gateway cannot tokenize it: {error}") from error
        ids, block = tokenized.tokens.ids, max(self._blocks.block_size, engine_block or 1)
        if len(ids) <= block:
            raise ProbeFailed(f"a prompt that the engine accepts fills no block of {block} tokens")
        return ProbePrompt(body=body, ids=ids, chain=self._blocks.chain(ids))

    async def _send(self, endpoint: Endpoint, prompt: ProbePrompt) -> int | None:
        """Send the prompt and return the cached tokens that the answer reports. Raises `ProbeFailed`."""
        headers = {"Content-Type": "application/json"}
        data = prompt.body
        if endpoint.rank is not None:
            position = endpoint.pod.position(endpoint.rank)
            headers[RANK] = str(position)
            if endpoint.pod.engine == "sglang":
                data = pin_rank(data, position)
        url, timeout = f"{endpoint.pod.url}{COMPLETIONS_PATH}", aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        try:
            async with self._session.post(
                url, data=data, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                answer = await response.read()
                if response.status != 200:
                    key = "; it requires an API key" if response.status in (401, 403) else ""
                    raise ProbeFailed(f"{COMPLETIONS_PATH} answered {response.status}{key}")
        except TimeoutError as error:
            raise ProbeFailed(f"no answer within {ANSWER_SECONDS:.0f} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ProbeFailed(client_error(error)) from error
        reported = usage(answer)
        return None if reported is None else reported.cached

    async def _predicted_hit(self, endpoint: Endpoint, model: str, listener: EventListener, prompt: ProbePrompt) -> int:
        """The hit that the events predict, once they cover the whole prompt or `patience` is over."""
        if not listener.is_connected(endpoint.name):
            return 0
        feed, deadline = listener.publishers[endpoint.name].feed, time.monotonic() + self._patience
        while True:
            predicted = await self._predict(endpoint, model, listener, prompt)
            size = feed.ledger.block_size
            if size is not None:
                whole = len(prompt.ids) // size * size // self._blocks.block_size * self._blocks.block_size
                if predicted >= min(whole, len(prompt.ids) - 1) // size * size > 0:
                    return predicted
            if time.monotonic() >= deadline:
                return predicted
            await asyncio.sleep(_POLL_SECONDS)

    async def _predict(self, endpoint: Endpoint, model: str, listener: EventListener, prompt: ProbePrompt) -> int:
        """Predict the hit as the router does: the tokens that the index has, in whole engine blocks."""
        lookup = Lookup(self._registry, listener.index, FeedCaches(listener.feeds))
        matches = await lookup.match(model, model, [endpoint.pod], prompt.chain)
        match = lookup.match_at(endpoint.name, matches)
        candidate = Candidate(
            name=endpoint.name,
            url=endpoint.pod.url,
            matched_blocks=match.blocks,
            matched_tail=match.tail,
            engine_block=None if match.cache is None else match.cache.engine_block,
        )
        return candidate.predicted_hit(len(prompt.ids), self._blocks.block_size)

    async def _other_publisher(
        self, endpoint: Endpoint, model: str, listener: EventListener, prompt: ProbePrompt
    ) -> str | None:
        """Another publisher of the pod that published the prompt's blocks."""
        for other in endpoint.pod.endpoints:
            if other.name != endpoint.name and await self._predict(other, model, listener, prompt):
                return EndpointName.parse(other.name).rank_label
        return None

    async def _hits(self, endpoint: Endpoint) -> int | None:
        """The engine's own counter of tokens found in its cache."""
        try:
            metrics = await self._api.metrics(endpoint.pod.url, now=time.monotonic())
        except (EngineDown, OutOfResources):
            return None
        if endpoint.rank is not None and metrics.ranks:
            rank = metrics.ranks.get(endpoint.rank)
            return None if rank is None else rank.prefix_hits
        return metrics.prefix_hits

    async def _hits_since(self, endpoint: Endpoint, before: int | None, predicted: int) -> int | None:
        """How much that counter has grown, once it is as much as predicted or `METRICS_SECONDS` are over."""
        deadline = time.monotonic() + METRICS_SECONDS
        while before is not None:
            now = await self._hits(endpoint)
            if now is None or now - before >= max(predicted, 1) or time.monotonic() >= deadline:
                return None if now is None else max(0, now - before)
            await asyncio.sleep(_POLL_SECONDS)
        return None
