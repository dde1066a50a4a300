"""Sends a new prompt to one publisher twice: its events must foretell what the second finds in the cache."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from dataclasses import dataclass

import aiohttp
import msgspec

from matrixinfer.blocks import BlockChain, TokenBlockProcessor, TokenIds
from matrixinfer.doctor.facts import ProbeFacts
from matrixinfer.doctor.listening import Ear
from matrixinfer.errors import MatrixInferError, TokenizeError
from matrixinfer.gateway.headers import RANK
from matrixinfer.gateway.usage import usage
from matrixinfer.kvevents.witness import Witness
from matrixinfer.pods.engine_api import EngineApi, EngineDown
from matrixinfer.pods.registry import Endpoint, PodRegistry
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.openai import COMPLETIONS_PATH
from matrixinfer.routing.lookup import Lookup
from matrixinfer.scheduler.framework import Candidate
from matrixinfer.trust.cache_views import FeedCaches

BLOCKS = 3
"""Blocks that a probe fills, of the larger of both sizes."""
LONGEST = 32_768
"""Tokens of a probe at most."""
ANSWER_SECONDS = 60.0
"""How long an engine may take for one: it may have to wait its turn."""
METRICS_SECONDS = 1.0
"""How long the engine's own count may lag behind an answer."""
_POLL_SECONDS = 0.05
_WORDS = ("the", "river", "of", "stone", "and", "light", "in", "water", "over", "time", "with", "wind", "from", "snow")


class Refused(MatrixInferError):
    """The engine did not compute the probe. Says why."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sent:
    """A probe, as the gateway sees it."""

    body: bytes
    ids: TokenIds
    chain: BlockChain


class Prober:
    """Probes endpoints. `patience` is in seconds: how long events may be on their way."""

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

    async def probe(self, endpoint: Endpoint, model: str, ear: Ear, engine_block: int | None) -> ProbeFacts:
        """What became of a new prompt at one endpoint."""
        try:
            sent = await self._write(endpoint, model, engine_block)
            witness = Witness(model, sent.ids, sent.chain, held=0, block_size=self._blocks.block_size)
            ledger = ear.heard[endpoint.name].feed.ledger
            ledger.witness = witness
            await self._send(endpoint, sent)
            predicted = await self._foretold(endpoint, model, ear, sent)
            ledger.witness = None
            elsewhere = None if predicted else await self._elsewhere(endpoint, model, ear, sent)
            before = await self._hits(endpoint)
            cached = await self._send(endpoint, sent)
            hits = await self._grown(endpoint, before, predicted)
        except Refused as error:
            return ProbeFacts(refused=str(error))
        return ProbeFacts(
            tokens=len(sent.ids),
            predicted=predicted,
            cached=cached,
            hits=hits,
            first_difference=witness.first_difference if witness.chains == 1 else None,
            elsewhere=elsewhere,
        )

    async def _write(self, endpoint: Endpoint, model: str, engine_block: int | None) -> Sent:
        """A prompt that nobody has sent before, tokenized as the gateway would. Raises `Refused`."""
        served = endpoint.pod.served
        length = None if served is None else served.context_length
        words = min(BLOCKS * max(self._blocks.block_size, engine_block or 1) + 8, LONGEST)
        if length is not None:
            words = min(words, length // 2)  # a word may be more than a token
        random_words = random.choices(_WORDS, k=words)  # noqa: S311 - unlike others, protects nothing
        prompt = " ".join((uuid.uuid4().hex, *random_words))
        body = msgspec.json.encode({"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0})
        try:
            read = await self._tokenizers.read(COMPLETIONS_PATH, body)
            configured = self._registry.configured_name(model, [endpoint.pod])
            tokenized = await self._tokenizers.tokenize(read, model=configured, engines=[endpoint.pod])
        except TokenizeError as error:
            raise Refused(f"it has no token ids here: {error}") from error
        ids, block = tokenized.tokens.ids, max(self._blocks.block_size, engine_block or 1)
        if len(ids) <= block:
            raise Refused(f"what fits the engine fills no block of {block} tokens")
        return Sent(body=body, ids=ids, chain=self._blocks.chain(ids))

    async def _send(self, endpoint: Endpoint, sent: Sent) -> int | None:
        """The cached tokens that the answer tells of. Raises `Refused`."""
        headers = {"Content-Type": "application/json"}
        if endpoint.rank is not None:
            headers[RANK] = str(endpoint.rank)
        url, timeout = f"{endpoint.pod.url}{COMPLETIONS_PATH}", aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        try:
            async with self._session.post(
                url, data=sent.body, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                answer = await response.read()
                if response.status != 200:
                    key = "; it wants an API key" if response.status in (401, 403) else ""
                    raise Refused(f"{COMPLETIONS_PATH} answered {response.status}{key}")
        except TimeoutError as error:
            raise Refused(f"no answer within {ANSWER_SECONDS:.0f} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Refused(str(error) or type(error).__name__) from error
        told = usage(answer)
        return None if told is None else told.cached

    async def _foretold(self, endpoint: Endpoint, model: str, ear: Ear, sent: Sent) -> int:
        """The hit that the events foretell, once they tell of the whole prompt or `patience` is over."""
        if not ear.is_connected(endpoint.name):
            return 0
        feed, deadline = ear.heard[endpoint.name].feed, time.monotonic() + self._patience
        while True:
            predicted = await self._predict(endpoint, model, ear, sent)
            size = feed.ledger.block_size
            if size is not None:
                whole = len(sent.ids) // size * size // self._blocks.block_size * self._blocks.block_size
                if predicted >= min(whole, len(sent.ids) - 1) // size * size > 0:
                    return predicted
            if time.monotonic() >= deadline:
                return predicted
            await asyncio.sleep(_POLL_SECONDS)

    async def _predict(self, endpoint: Endpoint, model: str, ear: Ear, sent: Sent) -> int:
        """As the router does: what the index holds of the prompt, in whole engine blocks."""
        lookup = Lookup(self._registry, ear.index, FeedCaches(ear.feeds))
        matches = await lookup.match(model, model, [endpoint.pod], sent.chain)
        held = lookup.held(endpoint.name, matches)
        candidate = Candidate(
            name=endpoint.name,
            url=endpoint.pod.url,
            matched_blocks=held.blocks,
            matched_tail=held.tail,
            engine_block=None if held.cache is None else held.cache.engine_block,
        )
        return candidate.predicted_hit(len(sent.ids), self._blocks.block_size)

    async def _elsewhere(self, endpoint: Endpoint, model: str, ear: Ear, sent: Sent) -> str | None:
        """Another publisher of the pod that tells of the prompt."""
        for other in endpoint.pod.endpoints:
            if other.name != endpoint.name and await self._predict(other, model, ear, sent):
                return other.name.removeprefix(f"{endpoint.pod.name}@")
        return None

    async def _hits(self, endpoint: Endpoint) -> int | None:
        """The engine's own count of tokens found in its cache."""
        try:
            metrics = await self._api.metrics(endpoint.pod.url, now=time.monotonic())
        except EngineDown:
            return None
        if endpoint.rank is not None and metrics.ranks:
            rank = metrics.ranks.get(endpoint.rank)
            return None if rank is None else rank.prefix_hits
        return metrics.prefix_hits

    async def _grown(self, endpoint: Endpoint, before: int | None, predicted: int) -> int | None:
        """By how much that count has grown, once it is by as much as was foretold or time is over."""
        deadline = time.monotonic() + METRICS_SECONDS
        while before is not None:
            now = await self._hits(endpoint)
            if now is None or now - before >= max(predicted, 1) or time.monotonic() >= deadline:
                return None if now is None else max(0, now - before)
            await asyncio.sleep(_POLL_SECONDS)
        return None
