"""Keeps the public keys of an identity provider: reads them again from time to time, and when a token names a new one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
import structlog

from matrixinfer.access.tokens import Key, NoKeys, Tokens, parse_key_set
from matrixinfer.config.access import JwtConfig
from matrixinfer.errors import KeysUnavailable, MatrixInferError, client_error
from matrixinfer.tasks import cancel_and_wait

FETCH_SECONDS = 5.0
MAX_BYTES = 1024 * 1024
PAUSE_SECONDS = 10.0
"""Keys are read at most this often, whatever keys tokens name."""
RETRY_SECONDS = 5.0

log = structlog.get_logger(__name__)


class NotFetched(MatrixInferError):
    """The provider's keys could not be read."""


class KeySource:
    """Gives `tokens` the provider's keys. Use as an async context manager. `clock` is monotonic."""

    def __init__(
        self, config: JwtConfig, tokens: Tokens, fetch: Callable[[], Awaitable[bytes]], clock: Callable[[], float]
    ) -> None:
        self._config = config
        self._tokens = tokens
        self._fetch = fetch
        self._clock = clock
        self._keys: Sequence[Key] = ()
        self._read_at: float | None = None
        self._tried_at = -PAUSE_SECONDS
        self._reading = asyncio.Lock()
        self._is_failing = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Read the keys, if they can be read now and none were inherited."""
        if self._read_at is None:
            await self._read()
        self._task = asyncio.create_task(self._refresh(), name="jwks")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await cancel_and_wait(self._task)

    def inherit(self, other: KeySource) -> None:
        """Begin with the keys that another one has read. No effect if it reads them elsewhere, or has none."""
        is_same = (other._config.jwks_url, other._config.jwks_file) == (self._config.jwks_url, self._config.jwks_file)
        if is_same and other._read_at is not None:
            self._keys, self._read_at, self._tried_at = other._keys, other._read_at, other._tried_at
            self._tokens.use(self._keys)

    @property
    def has_keys(self) -> bool:
        """Whether keys have ever been read."""
        return self._read_at is not None

    def check(self) -> None:
        """Raises `KeysUnavailable` if there are no keys, or only keys that are too old."""
        if self._read_at is None or self._clock() - self._read_at > self._config.keep_seconds:
            raise KeysUnavailable("Tokens cannot be checked now: the keys of their issuer cannot be read.")

    async def renew(self) -> None:
        """Read the keys again, unless that was tried a moment ago. Callers that come meanwhile wait for the same answer."""
        asked_at = self._clock()
        async with self._reading:
            if self._tried_at < asked_at and self._clock() - self._tried_at >= PAUSE_SECONDS:
                await self._read()

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(RETRY_SECONDS if self._is_failing else self._config.refresh_seconds)
            async with self._reading:
                await self._read()

    async def _read(self) -> None:
        self._tried_at = self._clock()
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                data = await self._fetch()
            keys = parse_key_set(data)
        except (NoKeys, NotFetched, TimeoutError) as error:
            if not self._is_failing:
                log.warning("jwks_not_read", source=self._source, reason=str(error) or "no answer in time")
            self._is_failing = True
            return
        self._tokens.use(keys)
        self._keys, self._read_at = keys, self._clock()
        if self._is_failing:
            log.info("jwks_read", source=self._source, keys=len(keys))
        self._is_failing = False

    @property
    def _source(self) -> str | None:
        return self._config.jwks_url or self._config.jwks_file


def from_file(file: str) -> Callable[[], Awaitable[bytes]]:
    """Reads a JWKS file."""

    async def fetch() -> bytes:
        try:
            return await asyncio.to_thread(Path(file).read_bytes)
        except OSError as error:
            raise NotFetched(f"cannot read {file}: {error.strerror}") from error

    return fetch


def from_url(url: str) -> Callable[[], Awaitable[bytes]]:
    """Fetches a JWKS document."""

    async def fetch() -> bytes:
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=FETCH_SECONDS)) as session,
                session.get(url, allow_redirects=False) as response,
            ):
                if response.status != 200:
                    raise NotFetched(f"{url} answered {response.status}")
                data = await response.content.read(MAX_BYTES + 1)
                while len(data) <= MAX_BYTES and (more := await response.content.read(MAX_BYTES)):
                    data += more
        except (aiohttp.ClientError, OSError) as error:
            raise NotFetched(f"{url}: {client_error(error)}") from error
        if len(data) > MAX_BYTES:
            raise NotFetched(f"{url} answered with more than {MAX_BYTES} bytes")
        return data

    return fetch
