"""Which engine gets which API key. Files are read again when they change, so that keys can be rotated."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import structlog
from yarl import URL

from matrixinfer.config import Config, ModelConfig, PodConfig
from matrixinfer.config.engine_keys import key_places
from matrixinfer.config.secrets import Secret, SecretPlace, place
from matrixinfer.errors import ConfigError
from matrixinfer.pods.pod import Pod
from matrixinfer.pods.registry import PodRegistry
from matrixinfer.tasks import cancel_and_wait

REREAD_SECONDS = 5.0
"""How often files with keys are read."""

log = structlog.get_logger(__name__)


class EngineKeys:
    """The keys of all engines: a pod's own, else that of its model, else the common one.

    `load` reads what the configuration names. Within its context, files are read again.
    """

    def __init__(self, config: Config, registry: PodRegistry) -> None:
        self._config = config
        self._registry = registry
        self._by_model = _by_name(config.models)
        common = config.engine_keys
        self._common = place(common.api_key_file, common.api_key_env, "$.engineKeys.apiKey")
        self._read: dict[tuple[str | None, str | None], Secret | None] = {}
        self._unreadable: set[tuple[str | None, str | None]] = set()
        self._pods: Sequence[Pod] = ()
        self._by_url: dict[str, Pod] = {}
        self._task: asyncio.Task[None] | None = None

    def reconfigure(self, models: Sequence[ModelConfig]) -> None:
        """Know models by these aliases from now on."""
        self._by_model = _by_name(models)

    def load(self) -> None:
        """Read every key that the configuration names. Raises `ConfigError`."""
        for each in key_places(self._config):
            self._read[each[:2]] = each.read()

    async def __aenter__(self) -> Self:
        """Read all keys, and begin to read files again. Raises `ConfigError`."""
        self.load()
        self._task = asyncio.create_task(self._reread(), name="engine keys")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            await cancel_and_wait(self._task)

    def at(self, base: str) -> Secret | None:
        """The key of the pod with that base URL; None if it needs none."""
        pod = self._pods_by_url().get(base)
        return None if pod is None else self.of(pod)

    def for_url(self, url: URL) -> Secret | None:
        """The key for a question to `url`: that of the pod with the longest base URL above it."""
        by_url, base = self._pods_by_url(), str(url.with_query(None))
        while base.count("/") >= 2:
            if base in by_url:
                return self.of(by_url[base])
            base = base.rpartition("/")[0]
        return None

    def of(self, pod: Pod) -> Secret | None:
        """The key of a pod; None if it needs none."""
        chosen = _of_pod(pod.config) or self._of_model(pod.config.model or pod.base_model) or self._common
        return None if chosen is None else self._value(chosen)

    def _of_model(self, model: str | None) -> SecretPlace | None:
        """A pod that has not said its model is taken to serve the only configured one."""
        if model is not None:
            return self._by_model.get(model)
        return _of_model(self._config.models[0]) if len(self._config.models) == 1 else None

    def _value(self, where: SecretPlace) -> Secret | None:
        if where[:2] not in self._read:  # of a pod that has joined
            self._read[where[:2]] = self._readable(where)
        return self._read[where[:2]]

    def _pods_by_url(self) -> dict[str, Pod]:
        if self._pods is not self._registry.pods:
            self._pods = self._registry.pods
            self._by_url = {_normal(pod.url): pod for pod in self._pods} | {pod.url: pod for pod in self._pods}
        return self._by_url

    async def _reread(self) -> None:
        while True:
            await asyncio.sleep(REREAD_SECONDS)
            for file, env in tuple(self._read):
                if file is None:
                    continue
                new = await asyncio.to_thread(self._readable, SecretPlace(file, env, "apiKey"))
                if new is not None and new != self._read[file, env]:
                    self._read[file, env] = new
                    log.info("engine_key_changed", file=file)

    def _readable(self, where: SecretPlace) -> Secret | None:
        """The secret; None, with one warning, while it cannot be read."""
        try:
            secret = where.read()
        except ConfigError as error:
            if where[:2] not in self._unreadable:
                self._unreadable.add(where[:2])
                log.warning("engine_key_not_read", reason=error.message)
            return None
        self._unreadable.discard(where[:2])
        return secret


def _of_pod(pod: PodConfig) -> SecretPlace | None:
    return place(pod.api_key_file, pod.api_key_env, f"apiKey of pod {pod.name}")


def _of_model(model: ModelConfig) -> SecretPlace | None:
    return place(model.api_key_file, model.api_key_env, f"apiKey of model {model.name}")


def _by_name(models: Sequence[ModelConfig]) -> dict[str, SecretPlace | None]:
    return {name: _of_model(model) for model in models for name in (model.name, *model.aliases)}


def _normal(url: str) -> str:
    """A base URL as it begins the URLs of questions."""
    return str(URL(url)).rstrip("/")
