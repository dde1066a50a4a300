"""The folders that may hold a model's tokenizer: those that its engines name, and what can be downloaded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence

import structlog

from matrixinfer.config import TokenizationConfig
from matrixinfer.errors import TokenizeError
from matrixinfer.prompt import found, hub
from matrixinfer.prompt.fleet import Served

log = structlog.get_logger(__name__)


class Search:
    """One search for the tokenizer of a model. `reasons` then says why there are no more places."""

    def __init__(self, model: str, settings: TokenizationConfig, environment: Mapping[str, str]) -> None:
        self._model = model
        self._settings = settings
        self._environment = environment
        self.reasons: list[str] = []

    async def places(self, engines: Sequence[Served]) -> AsyncGenerator[found.Place, None]:
        """The places in the order in which to try them. What is missing is downloaded if that is allowed."""
        if self._settings.find == "none":
            self.reasons.append("`tokenization.find` is `none`")
            return
        cache = found.hub_cache(self._environment)
        if not all(each.roots for each in engines):
            self.reasons.append("the engine does not report where its model is")
        for root in dict.fromkeys(root for each in engines for root in each.roots):
            named = await asyncio.to_thread(found.places, root, cache)
            for place in named.places:
                yield place
            if named.missing is not None:
                self.reasons.append(named.missing)
            if named.repo is not None and self._settings.find == "download":
                downloaded = await self._download(named.repo, named.revision)
                if downloaded is not None:
                    yield downloaded

    async def _download(self, repo: str, revision: str | None) -> found.Place | None:
        log.info("tokenizer_download_started", model=self._model, repository=repo, revision=revision)
        try:
            path = await hub.download(repo, revision, timeout_seconds=self._settings.download_seconds)
        except TokenizeError as error:
            self.reasons.append(str(error))
            return None
        return found.Place(path=path, origin=f"downloaded, revision {path.name} of {repo}")
