"""TLS of a listener. A new certificate is used by the next handshake; a broken one changes nothing, and is reported."""

from __future__ import annotations

import asyncio
import ssl
from types import TracebackType
from typing import Self

import structlog

from matrixinfer.config import ListenerTlsConfig
from matrixinfer.config.files import Stamp
from matrixinfer.errors import ConfigError
from matrixinfer.pods.certificates import load_authorities, load_pair, stamps
from matrixinfer.tasks import cancel_and_wait

_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

log = structlog.get_logger(__name__)


class ListenerTls:
    """The context with which a listener accepts, whose certificate and trust are replaced when their files change.

    `path` is that of the section in the configuration. Within its context, files are looked at again.
    """

    def __init__(self, config: ListenerTlsConfig, path: str) -> None:
        self._config = config
        self._path = path
        self._current: ssl.SSLContext | None = None
        self._seen: tuple[Stamp | None, ...] = ()
        self._has_changed = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Read the files. Raises `ConfigError`."""
        self._seen = self._state()
        self._current = await asyncio.to_thread(self._load)
        self._task = asyncio.create_task(self._watch(), name="tls files")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            await cancel_and_wait(self._task)

    def context(self) -> ssl.SSLContext:
        """What the listener accepts with. Each handshake is handed over to the latest certificate and trust."""
        if self._current is None:
            raise RuntimeError("enter the context first")
        accepting = self._load()
        accepting.sni_callback = self._hand_over
        return accepting

    def _hand_over(self, connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> int | None:
        if self._config.client_ca_file is not None and self._has_changed and connection.session_reused:
            # Only TLS 1.2 comes here: its sessions cannot be turned off. The client then begins a new one.
            return ssl.ALERT_DESCRIPTION_HANDSHAKE_FAILURE
        if self._current is not None:
            connection.context = self._current
        return None

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._config.reload_seconds)
            await self.reload()

    async def reload(self) -> None:
        """Look at the files, and use them if they have changed and are in order."""
        state = await asyncio.to_thread(self._state)
        if state == self._seen:
            return
        self._seen = state
        try:
            self._current = await asyncio.to_thread(self._load)
        except ConfigError as error:
            log.error("tls_not_reloaded", section=self._path, reason=error.message)  # noqa: TRY400 - says all
        else:
            self._has_changed = True
            log.info("tls_reloaded", section=self._path)

    def _state(self) -> tuple[Stamp | None, ...]:
        return stamps(self._config.cert_file, self._config.key_file, self._config.client_ca_file)

    def _load(self) -> ssl.SSLContext:
        config = self._config
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = _VERSIONS[config.min_version]
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        load_pair(context, config.cert_file, config.key_file, self._path)
        if config.client_ca_file is not None:
            load_authorities(context, config.client_ca_file, f"{self._path}.clientCaFile")
            context.verify_mode = ssl.CERT_REQUIRED
            # A resumed session is not verified again: it would outlast the trust in its client's authority.
            context.options |= ssl.OP_NO_TICKET
            context.num_tickets = 0
        return context
