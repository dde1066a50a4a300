"""Notices when lookups of a model never match, because its blocks are hashed or named differently in Redis."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import structlog

from matrixinfer.blocks import BlockChain, TokenBlockProcessor
from matrixinfer.errors import IndexUnavailable
from matrixinfer.index.redis import fit
from matrixinfer.index.redis.store import Store
from matrixinfer.tasks import cancel_and_wait

LOOKUPS = 40
"""After so many lookups of a model without a match, Redis is asked why."""
PROMPTS = 8
"""Prompts of a model that are remembered, by their first tokens, to look for their blocks."""
MAX_MODELS = 64
PAUSE_SECONDS = 30.0
"""Shortest time between two searches in Redis."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Model:
    """The lookups of one model."""

    lookups: int = 0
    """Since the last match."""
    matched: bool = False
    """Whether any lookup has ever matched."""
    prompts: deque[bytes] = field(default_factory=lambda: deque(maxlen=PROMPTS))


class MatchWatch:
    """Watches the lookups in an index that others write. Use as an async context manager; it owns one task.

    A lookup matches if a pod that is known here holds two blocks of the prompt, or its only one: the first blocks of a
    prompt have the same hash in both schemes. `knows` says whether a name is that of a pod or a rank, `endpoints` returns
    these names, and `sizes` the block sizes of the engines.
    """

    def __init__(
        self,
        store: Store,
        blocks: TokenBlockProcessor,
        *,
        knows: Callable[[str], bool],
        endpoints: Callable[[], Collection[str]],
        sizes: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self.problems: dict[str, fit.Problem] = {}
        """Why lookups do not match, by the model's name in Redis."""
        self._store = store
        self._blocks = blocks
        self._knows = knows
        self._endpoints = endpoints
        self._sizes = sizes
        self._models: dict[str, _Model] = {}
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="redis-match-watch")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await cancel_and_wait(self._task)

    def observe(self, model: str, hashes: Sequence[int], found: Mapping[str, int]) -> None:
        """Record a lookup and its answer."""
        if not isinstance(hashes, BlockChain) or hashes.is_salted or hashes.media or not hashes.tokens:
            return
        state = self._models.get(model)
        if state is None:
            if len(self._models) >= MAX_MODELS:
                return
            state = self._models[model] = _Model()
        needed = min(2, len(hashes))
        if needed and any(count >= needed and self._knows(name) for name, count in found.items()):
            state.lookups, state.matched = 0, True
            self.problems.pop(model, None)
            return
        state.lookups += 1
        state.prompts.append(hashes.head(fit.HEAD_TOKENS))
        if state.lookups % LOOKUPS == 0:
            self._wanted.set()

    async def search(self) -> list[fit.Problem]:
        """Look in Redis why the lookups since the last match of each model did not match. Raises `IndexUnavailable`."""
        for model, state in list(self._models.items()):
            if state.lookups:
                await self._search(model, state)
        return list(self.problems.values())

    async def _search(self, model: str, state: _Model) -> None:
        lookups = state.lookups
        found = await fit.find(self._store, model, list(state.prompts), self._blocks, self._sizes())
        why = fit.problem(found, self._blocks, self._knows, self._endpoints())
        if why is None or not state.lookups:
            self.problems.pop(model, None)
            return
        keys = f"any of {'' if found.scanned_all else 'at least '}{found.keys:,} keys"
        if not found.keys and not found.scanned_all:
            keys = "any key"  # this user may not scan them
        message = f"none of {lookups:,} lookups of {model} matched {keys}; {why[0]}"
        self.problems[model] = fit.Problem(model=model, keys=found.keys, message=message, fix=why[1])

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                for model, state in list(self._models.items()):
                    if state.lookups >= LOOKUPS:
                        known = self.problems.get(model)
                        await self._search(model, state)
                        self._report(model, known)
            except IndexUnavailable as error:
                log.info("redis_match_search_failed", error=str(error))
            except Exception:
                # Supervision boundary: unexpected data in Redis must not end the task.
                log.exception("redis_match_watch_crashed")
            await asyncio.sleep(PAUSE_SECONDS)

    def _report(self, model: str, known: fit.Problem | None) -> None:
        """Log a problem once, and again when its fix is another one."""
        problem = self.problems.get(model)
        if problem is not None and (known is None or known.fix != problem.fix):
            log.warning("redis_lookups_unmatched", model=model, problem=problem.message, fix=problem.fix)
