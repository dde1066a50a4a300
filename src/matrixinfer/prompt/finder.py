"""Finds the tokenizers of models that have none configured, and checks them against the engines, in the background.

A tokenizer that was found is used only if its token ids equal those of every engine of the model on samples that are
hard to tokenize. It is checked again when an engine restarts, changes or joins, and no longer used when one differs. If
only chats differ, it is used for texts, and an engine is asked for chats. Until then, and otherwise, engines are asked.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import msgspec
import structlog

from matrixinfer.config import ModelConfig, TokenizationConfig
from matrixinfer.errors import ConfigError, TokenizeError
from matrixinfer.prompt import found, hub, loader
from matrixinfer.prompt.base import Tokenizer
from matrixinfer.prompt.engine_check import EngineCheck
from matrixinfer.prompt.fleet import Fleet, Served
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.remote import RemoteTokenizer
from matrixinfer.prompt.search import Search
from matrixinfer.prompt.source import Checked, Source
from matrixinfer.tasks import cancel_and_wait

POLL_SECONDS = 1.0
"""Time between two looks at which engines there are."""
RETRY_SECONDS = 5.0
MAX_RETRY_SECONDS = 600.0
"""After a failed attempt, the pause doubles from the first to the second of these."""
log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Model:
    """What is known about one model."""

    source: Source
    tokenizer: Tokenizer | None = None
    """The tokenizer that is in use, also for chats."""
    seen: dict[str, object] = field(default_factory=dict)
    """The identity of each engine at the last look."""
    results: dict[str, Checked] = field(default_factory=dict)
    """What the check of the tokenizer in use has shown, by engine."""
    stamps: dict[str, float] = field(default_factory=dict)
    """When the files of each refused folder were last changed."""
    is_known: bool = False
    """An attempt has ended, so the source is more than an assumption."""
    failures: int = 0
    due: float = 0.0
    task: asyncio.Task[None] | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class TokenizerFinder:
    """Looks for tokenizers and hands them to `tokenizers`. `remote` must not share answers between engines.

    Use as an async context manager, which owns the tasks; or call `look` instead. `fleet` gives the engines of now; each
    has `answer_seconds` for a sample.
    `distrusts` says whether a model's token ids have lately differed from what its engines report.
    """

    def __init__(
        self,
        models: Sequence[ModelConfig],
        settings: TokenizationConfig,
        tokenizers: TokenizerManager,
        remote: RemoteTokenizer,
        *,
        fleet: Callable[[], Fleet],
        distrusts: Callable[[str], bool] = lambda _: False,
        block_size: int = 128,
        answer_seconds: float = 10.0,
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._configured = {model.name: model for model in models}
        self._settings = settings
        self._tokenizers = tokenizers
        self._fleet = fleet
        self._distrusts = distrusts
        self._check = EngineCheck(settings, remote, block_size=block_size, answer_seconds=answer_seconds)
        self._environment = environment
        self._clock = clock
        self._models: dict[str, _Model] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Start to look. Raises `ConfigError` if downloads are wanted and cannot be made."""
        if self._settings.find == "download" and not hub.can_download():
            raise ConfigError("$.tokenization.find", "downloads need an extra: pip install 'matrixinfer-gateway[hub]'")
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._stop)
            stack.push_async_callback(cancel_and_wait, asyncio.create_task(self._watch(), name="find-tokenizers"))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def sources(self) -> Mapping[str, Source]:
        """Where the token ids of each model come from."""
        configured = {name: _configured(model) for name, model in self._configured.items() if model.tokenizer}
        return configured | {name: model.source for name, model in self._models.items()}

    async def look(self, name: str, engines: Sequence[Served]) -> Source:
        """Make one attempt for the model `name` now. `engines` are all that count."""
        if _is_configured(self._configured.get(name)):
            return self.sources[name]
        model = self._models.setdefault(name, _unknown())
        async with model.lock:
            await self._attempt(name, model, engines)
        return model.source

    async def _watch(self) -> None:
        """Start an attempt for every model that needs one, at most one per model at a time."""
        for name, source in self.sources.items():
            _log_source(name, source)
        while True:
            try:
                await self._poll(self._fleet())
            except Exception:
                # Supervision boundary: what is in use stays in use.
                log.exception("tokenizer_watch_failed")
            await asyncio.sleep(POLL_SECONDS)

    async def _poll(self, fleet: Fleet) -> None:
        for name in [name for name in self._models if name not in fleet]:
            await self._forget(name)
        for name, engines in fleet.items():
            if _is_configured(self._configured.get(name)):
                continue
            model = self._models.setdefault(name, _unknown())
            self._notice(name, model, engines)
            here = [each for each in engines if each.healthy]
            if model.task is None and here and self._clock() >= model.due and _has_work(model, here):
                model.task = asyncio.create_task(self._supervised(name, model, here), name=f"find-{name}")

    def _notice(self, name: str, model: _Model, engines: Sequence[Served]) -> None:
        """Notice what has changed since the last look: engines that joined, went, restarted or are others now."""
        now = {each.name: (each.roots, each.model, each.identity) for each in engines if each.healthy}
        changed = {engine for engine, identity in now.items() if model.seen.get(engine) != identity}
        for engine in changed | (model.results.keys() - now.keys()):
            model.results.pop(engine, None)
        model.seen = dict(now)
        if changed:
            # An engine that comes and goes does not cause one attempt after the other.
            model.due = min(model.due, self._clock() + RETRY_SECONDS) if model.is_known else 0.0
            model.stamps.clear()
            self._tokenizers.engines_changed()
        if model.source.kind == "found" and model.task is None and self._distrusts(name):
            path = Path(model.source.path or "")
            self._refuse(
                name, model, "its token ids have differed from what the engines report", found.changed_at(path)
            )

    async def _supervised(self, name: str, model: _Model, engines: Sequence[Served]) -> None:
        try:
            await self._attempt(name, model, engines)
        except Exception:
            # Supervision boundary: without a tokenizer of its own, the gateway asks the engines.
            log.exception("tokenizer_search_failed", model=name)
            self._retry(model)
        finally:
            model.task = None

    async def _attempt(self, name: str, model: _Model, engines: Sequence[Served]) -> None:
        """Check what is in use with the engines that it was not checked with, or look for something to use."""
        if model.tokenizer is not None:
            missing = [each for each in engines if each.name not in model.results]
            model.results |= await self._check.compare(model.tokenizer, missing)
            self._settle(name, model)
        if model.tokenizer is None:
            await self._search(name, model, engines)

    async def _search(self, name: str, model: _Model, engines: Sequence[Served]) -> None:
        """Use the first tokenizer that equals the engines', if there is one."""
        search = Search(name, self._settings, self._environment)
        async with aclosing(search.places(engines)) as places:
            async for place in places:
                if await self._try(name, model, place, engines):
                    return
        self._asks(name, model, "; ".join((*search.reasons, *model.source.refused.values())) or "no engine was found")

    async def _try(self, name: str, model: _Model, place: found.Place, engines: Sequence[Served]) -> bool:
        """Load a tokenizer and check it with every engine. Returns whether it is used."""
        path = str(place.path)
        stamp = await asyncio.to_thread(found.changed_at, place.path)
        if model.stamps.get(path) == stamp:
            return False
        config = msgspec.structs.replace(self._configured.get(name) or ModelConfig(name=name), tokenizer=path)
        model.source = replace(model.source, path=path, origin=place.origin)
        try:
            tokenizer, results = await self._check.first(config, engines)
        except TokenizeError as error:
            self._refuse(name, model, f"it could not be compared: {error}")
            return False
        except ConfigError as error:
            self._refuse(name, model, error.message, stamp)
            return False
        whole = Checked.all(results.values())
        if whole.refused is not None:
            self._refuse(name, model, whole.refused, stamp)
            return False
        if whole.unanswered is not None:
            self._refuse(name, model, whole.unanswered)
            return False
        model.tokenizer, model.results, model.failures = tokenizer, results, 0
        self._settle(name, model)
        return True

    def _settle(self, name: str, model: _Model) -> None:
        """Use the tokenizer as far as the checks allow. What could not be compared now is compared again later."""
        whole = Checked.all(model.results.values())
        if whole.refused is not None:
            self._refuse(name, model, whole.refused, found.changed_at(Path(model.source.path or "")))
            return
        model.results = {engine: each for engine, each in model.results.items() if not each.again}
        if whole.again:
            self._retry(model)
        tokenizer = model.tokenizer
        if tokenizer is None:
            return
        if whole.chats is not None and not isinstance(tokenizer, loader.TextTokenizer):
            tokenizer = loader.TextTokenizer(tokenizer, whole.chats)
        self._tokenizers.use(name, tokenizer)
        asks = isinstance(tokenizer, loader.TextTokenizer)
        reason = whole.chats or (tokenizer.reason if isinstance(tokenizer, loader.TextTokenizer) else None)
        source = replace(
            model.source,
            kind="found",
            asks_for_chats=asks,
            reason=reason,
            checked=tuple(sorted(model.results)),
            refused={path: why for path, why in model.source.refused.items() if path != model.source.path},
        )
        self._set(name, model, source)

    def _refuse(self, name: str, model: _Model, reason: str, stamp: float | None = None) -> None:
        """Do not use the tokenizer at `model.source.path`; with `stamp` not before its files or the engines change."""
        path = model.source.path or ""
        if model.source.refused.get(path) != reason:
            log.warning("tokenizer_refused", model=name, path=path, reason=reason)
        if stamp is not None:
            model.stamps[path] = stamp
        model.tokenizer = None
        model.results.clear()
        self._tokenizers.use(name, None)
        refused = {**model.source.refused, path: reason}
        self._set(name, model, Source(kind="asked", reason=reason, refused=refused))

    def _asks(self, name: str, model: _Model, reason: str) -> None:
        """Nothing was found that can be used: engines are asked, and the next attempt is made later."""
        self._set(name, model, Source(kind="asked", reason=reason, refused=model.source.refused))
        self._retry(model)

    def _retry(self, model: _Model) -> None:
        model.due = self._clock() + min(RETRY_SECONDS * 2.0 ** min(model.failures, 16), MAX_RETRY_SECONDS)
        model.failures += 1

    def _set(self, name: str, model: _Model, source: Source) -> None:
        old, model.source = model.source, source
        known, model.is_known = model.is_known, True
        changed = (old.kind, old.path, old.asks_for_chats) != (source.kind, source.path, source.asks_for_chats)
        if changed or not known:
            _log_source(name, source)

    async def _forget(self, name: str) -> None:
        """No pod serves the model any more."""
        model = self._models.pop(name)
        await cancel_and_wait(model.task)
        self._tokenizers.use(name, None)

    async def _stop(self) -> None:
        for model in self._models.values():
            await cancel_and_wait(model.task)


def _is_configured(model: ModelConfig | None) -> bool:
    return model is not None and model.tokenizer is not None


def _configured(model: ModelConfig) -> Source:
    return Source(kind="configured", path=model.tokenizer)


def _unknown() -> _Model:
    return _Model(Source(kind="asked", reason="no attempt to find a tokenizer has ended yet"))


def _has_work(model: _Model, engines: Sequence[Served]) -> bool:
    return model.tokenizer is None or any(each.name not in model.results for each in engines)


def _log_source(name: str, source: Source) -> None:
    log.info("tokenizer_source_chosen", model=name, **source.view())
