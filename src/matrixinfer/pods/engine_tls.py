"""How engines with `https` URLs are reached: which authorities to trust, and which certificate to present."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Self

import structlog
from yarl import URL

from matrixinfer.config import Config, EngineTlsConfig
from matrixinfer.config.files import Stamp
from matrixinfer.errors import ConfigError
from matrixinfer.pods.certificates import load_authorities, load_pair, stamps
from matrixinfer.pods.pod import Pod
from matrixinfer.pods.registry import PodRegistry
from matrixinfer.tasks import cancel_and_wait

RELOAD_SECONDS = 10.0
"""How often files are looked at."""

log = structlog.get_logger(__name__)


class Trust(NamedTuple):
    """How one engine is reached."""

    context: ssl.SSLContext
    server_name: str | None
    """The name that its certificate must have; None for the host of its URL."""


class EngineTls:
    """The settings of each engine: those of its pod, else the common ones, else what the system trusts.

    `load` reads what the configuration names. Within its context, files are looked at again; connections that are open
    stay as they are.
    """

    def __init__(self, config: Config, registry: PodRegistry) -> None:
        self._config = config
        self._registry = registry
        self._loaded: dict[EngineTlsConfig | None, tuple[ssl.SSLContext, tuple[Stamp | None, ...]]] = {}
        self._pods: Sequence[Pod] = ()
        self._by_origin: dict[tuple[str | None, int | None], EngineTlsConfig | None] = {}
        self._task: asyncio.Task[None] | None = None

    def load(self) -> None:
        """Read every file that the configuration names. Raises `ConfigError`."""
        if self._config.engine_tls is not None:
            self._load(self._config.engine_tls, "$.engineTls")
        for i, pod in enumerate(self._config.pods):
            if pod.tls is not None:
                self._load(pod.tls, f"$.pods[{i}].tls")

    async def __aenter__(self) -> Self:
        """Read all files, and begin to look at them again. Raises `ConfigError`."""
        await asyncio.to_thread(self.load)
        self._task = asyncio.create_task(self._watch(), name="engine tls files")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            await cancel_and_wait(self._task)

    def at(self, host: str | None, port: int | None) -> Trust:
        """How to reach the engine at a host and port."""
        if self._pods is not self._registry.pods:
            self._pods = self._registry.pods
            self._by_origin = {_origin(pod.url): pod.config.tls for pod in self._pods}
        chosen = self._by_origin.get((host, port)) or self._config.engine_tls
        context = self._context(chosen)
        return Trust(context, None if chosen is None else chosen.server_name)

    def for_url(self, url: URL) -> Trust | None:
        """How to reach the engine at a URL; None without TLS."""
        return self.at(url.host, url.port) if url.scheme == "https" else None

    def _context(self, chosen: EngineTlsConfig | None) -> ssl.SSLContext:
        if chosen not in self._loaded:  # the system's, or those of a pod that has joined
            try:
                self._load(chosen, "tls")
            except ConfigError as error:
                log.error("engine_tls_not_loaded", reason=error.message)  # noqa: TRY400 - says all
                self._loaded[chosen] = ssl.create_default_context(), ()
        return self._loaded[chosen][0]

    def _load(self, config: EngineTlsConfig | None, path: str) -> None:
        seen = _stamps(config)
        self._loaded[config] = _made(config, path), seen

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            await self.reload()

    async def reload(self) -> None:
        """Look at the files, and use those that have changed and are in order."""
        for config, (context, seen) in tuple(self._loaded.items()):
            state = await asyncio.to_thread(_stamps, config)
            if state == seen:
                continue
            self._loaded[config] = context, state
            try:
                await asyncio.to_thread(self._load, config, "tls")
            except ConfigError as error:
                log.error("engine_tls_not_loaded", reason=error.message)  # noqa: TRY400 - says all
            else:
                log.info("engine_tls_reloaded")


def _made(config: EngineTlsConfig | None, path: str) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if config is None:
        return context
    if config.ca_file is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        load_authorities(context, config.ca_file, f"{path}.caFile")
    if not config.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if config.cert_file is not None and config.key_file is not None:
        load_pair(context, config.cert_file, config.key_file, path)
    return context


def _stamps(config: EngineTlsConfig | None) -> tuple[Stamp | None, ...]:
    return () if config is None else stamps(config.ca_file, config.cert_file, config.key_file)


def _origin(url: str) -> tuple[str | None, int | None]:
    parsed = URL(url)
    return parsed.host, parsed.port
