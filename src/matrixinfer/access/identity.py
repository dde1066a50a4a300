"""From the headers of a request to its caller."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import structlog
from multidict import MultiMapping

from matrixinfer.access.callers import Caller
from matrixinfer.access.key_file import KeyRing, parse_keys
from matrixinfer.config.access import AccessConfig, QuotaConfig
from matrixinfer.config.files import Stamp, stamp
from matrixinfer.errors import ConfigError, Unauthenticated
from matrixinfer.tasks import cancel_and_wait

if TYPE_CHECKING:
    from matrixinfer.access.key_source import KeySource
    from matrixinfer.access.tokens import Tokens

KEY_HEADERS = ("x-api-key", "api-key")
"""Where clients of Anthropic's and Azure's APIs send their key."""
REREAD_SECONDS = 2.0
"""How often the file of keys is checked for changes."""
SETTLE_SECONDS = 0.2
"""A new file counts once it is still the same after this long: half of it would lock out those in the other half."""
MAX_KEYS_BYTES = 64 * 1024 * 1024

log = structlog.get_logger(__name__)


class Identifier(Protocol):
    """Finds the caller of a request."""

    async def identify(self, headers: MultiMapping[str]) -> Caller:
        """The caller. Raises `Unauthenticated`, and `KeysUnavailable` if tokens cannot be checked now."""
        ...


class Identity:
    """Callers with API keys or tokens. Use as an async context manager, which reads the keys. `now`: Unix seconds.

    One that is to replace `before` takes over what that has read of the issuer's keys, and must have some.
    """

    def __init__(
        self,
        config: AccessConfig,
        *,
        before: Identity | None = None,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._before = before
        self._now = now
        self._clock = clock
        self._ring = KeyRing()
        self._tokens: Tokens | None = None
        self.source: KeySource | None = None
        """Where the keys of the issuer of tokens come from, if tokens are taken."""
        self._seen: Stamp | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Read the keys. Raises `ConfigError` when the file of keys cannot be used, or an extra is missing."""
        before, self._before = self._before, None
        async with AsyncExitStack() as stack:
            if self._config.keys_file is not None:
                self._seen, self._ring = read_keys(self._config.keys_file, self._config.limits)
                task = asyncio.create_task(self._reread(self._config.keys_file), name="access keys")
                stack.push_async_callback(cancel_and_wait, task)
            if self._config.jwt is not None:
                self._open_tokens()
                if self.source is not None:
                    await _enter_source(stack, self.source, before)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def identify(self, headers: MultiMapping[str]) -> Caller:
        """The caller, by `Authorization: Bearer` or a header for keys.

        Raises `Unauthenticated`, and `KeysUnavailable` if tokens cannot be checked now.
        """
        credential = _credential(headers)
        caller = self._ring.find(credential, self._now())
        if caller is not None:
            return caller
        if self._tokens is not None and credential.count(".") == 2:
            return await self._holder(credential)
        raise Unauthenticated("This API key is not valid.")

    async def _holder(self, token: str) -> Caller:
        from matrixinfer.access.tokens import UnknownKey  # noqa: PLC0415 - needs an extra

        assert self._tokens is not None  # noqa: S101 - its only caller has looked
        assert self.source is not None  # noqa: S101 - both are made together
        self.source.check()
        try:
            return self._tokens.check(token)
        except UnknownKey:
            await self.source.renew()
        try:
            return self._tokens.check(token)
        except UnknownKey as error:
            raise Unauthenticated("The token is not valid: it is signed with an unknown key.") from error

    def _open_tokens(self) -> None:
        jwt = self._config.jwt
        if jwt is None:
            return
        try:
            from matrixinfer.access import key_source, tokens  # noqa: PLC0415 - needs an extra
        except ModuleNotFoundError as error:
            raise ConfigError("$.access.jwt", "needs an extra: pip install 'matrixinfer-gateway[jwt]'") from error
        self._tokens = tokens.Tokens(jwt, self._config.limits, self._now)
        fetch = key_source.from_file(jwt.jwks_file) if jwt.jwks_file else key_source.from_url(jwt.jwks_url or "")
        self.source = key_source.KeySource(jwt, self._tokens, fetch, self._clock)

    async def _reread(self, file: str) -> None:
        while True:
            await asyncio.sleep(REREAD_SECONDS)
            found = await asyncio.to_thread(stamp, file)
            if found is None or found == self._seen:
                continue  # a file that is not there may be about to be replaced
            await asyncio.sleep(SETTLE_SECONDS)
            if await asyncio.to_thread(stamp, file) != found:
                continue
            before = self._ring.names
            try:
                self._seen, self._ring = await asyncio.to_thread(read_keys, file, self._config.limits)
            except ConfigError as error:
                self._seen = found  # log it once
                log.warning("access_keys_refused", reason=error.message)
                continue
            after = self._ring.names
            log.info("access_keys_changed", keys=len(after), added=len(after - before), removed=len(before - after))


async def _enter_source(stack: AsyncExitStack, source: KeySource, before: Identity | None) -> None:
    if before is not None and before.source is not None:
        source.inherit(before.source)
    await stack.enter_async_context(source)
    if before is not None and not source.has_keys:
        raise ConfigError("$.access.jwt", "the keys of the issuer cannot be read")


def read_keys(file: str, default: QuotaConfig) -> tuple[Stamp | None, KeyRing]:
    """The stamp of a file of keys, and its keys. Raises `ConfigError`."""
    found = stamp(file)  # before the content: a change in between is seen the next time
    try:
        return found, parse_keys(_text(file), default)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("$.access.keysFile", f"cannot read {file}: {error}") from error
    except ConfigError as error:
        raise ConfigError("$.access.keysFile", f"{file}: {error}") from error


def _credential(headers: MultiMapping[str]) -> str:
    """The key or token of a request. Raises `Unauthenticated`."""
    given = headers.getall("authorization", ())
    if len(given) > 1:
        raise Unauthenticated("Expected one `Authorization` header, got several.")
    if given:
        scheme, _, credential = given[0].strip().partition(" ")
        if scheme.lower() != "bearer" or not credential.strip():
            raise Unauthenticated("Expected `Authorization: Bearer KEY`.")
        return credential.strip()
    for name in KEY_HEADERS:
        if key := headers.get(name, "").strip():
            return key
    raise Unauthenticated("No API key: send `Authorization: Bearer KEY`.")


def _text(file: str) -> str:
    with Path(file).open("rb") as stream:
        data = stream.read(MAX_KEYS_BYTES + 1)
    if len(data) > MAX_KEYS_BYTES:
        raise ConfigError("$", f"expected at most {MAX_KEYS_BYTES} bytes")
    return data.decode()
