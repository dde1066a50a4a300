"""The connection to Redis or Valkey, alone, behind Sentinel or as a Cluster: one client per process."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import structlog
from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, NoScriptError, RedisClusterException, RedisError, ResponseError

from matrixinfer.config import RedisConfig, split_address
from matrixinfer.errors import IndexUnavailable, shortage_in

CONNECT_SECONDS = 2.0
REPLY_SECONDS = 5.0
"""Deadline for one reply if the caller has no shorter one."""

MAX_UNREADABLE = 100
"""Keys of another type that are logged."""

log = structlog.get_logger(__name__)

T = TypeVar("T")
Client = Redis | RedisCluster


_STATE = re.compile("(?!ERR |WRONGTYPE )[A-Z]{3,} ")
"""Begins errors that are about the server, such as `BUSY` and `MISCONF`; those that have a class are, too."""
_REFUSALS = ("unknown command", "acl failure", "can't run this command", "noperm")
"""Parts of errors that mean that this user, or this server, does not run a script or a command in it."""


class ScriptsRefused(IndexUnavailable):
    """The server does not run scripts for this user."""


class Script:
    """A Lua script, loaded into the server on first use, and again if the server has lost it."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha: str | None = None


class Store:
    """Owns the client. Use as an async context manager; it connects on first use.

    It never retries: only the caller knows whether there is time for that.
    """

    def __init__(self, config: RedisConfig) -> None:
        self.config = config
        self.client: Client = _client(config)
        self._unreadable: set[str] = set()

    @property
    def is_cluster(self) -> bool:
        """Whether keys are spread over servers, so that a script can only access one slot."""
        return self.config.cluster

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        clients: list[Client] = [self.client]
        if isinstance(self.client, Redis) and isinstance(self.client.connection_pool, SentinelConnectionPool):
            clients += self.client.connection_pool.sentinel_manager.sentinels
        for client in clients:
            with suppress(RedisError, OSError):
                await client.aclose()

    async def run(self, script: Script, keys: Sequence[str | bytes], args: Sequence[str | int | float | bytes]) -> Any:
        """Run a script and return its result. Raises `IndexUnavailable`; `ScriptsRefused` if scripts may not run."""
        with unavailable():
            try:
                if script.sha is None:
                    script.sha = await self._load(script)
                try:
                    return await self._answer(self.client.evalsha(script.sha, len(keys), *keys, *args))
                except NoScriptError:  # the server was restarted or replaced
                    script.sha = await self._load(script)
                    return await self._answer(self.client.evalsha(script.sha, len(keys), *keys, *args))
            except NoPermissionError as error:
                raise ScriptsRefused(str(error)) from error
            except ResponseError as error:
                if any(sign in str(error).lower() for sign in _REFUSALS):
                    raise ScriptsRefused(str(error)) from error
                raise

    async def ask(self, answer: Awaitable[T]) -> T:
        """Await an answer of the client. Raises `IndexUnavailable`."""
        with unavailable():
            return cast("T", await self._answer(answer))

    async def table(self, key: str) -> Mapping[bytes, bytes]:
        """A hash; an empty one if the key holds something else. Raises `IndexUnavailable`."""
        try:
            return await self.ask(cast("Any", self.client).hgetall(key))
        except IndexUnavailable as error:
            if not is_wrong_type(error.__cause__):
                raise
            self.unreadable(key)
            return {}

    def unreadable(self, key: str) -> None:
        """Log once that a key holds something else than a hash, and is read as an empty one."""
        if key not in self._unreadable and len(self._unreadable) < MAX_UNREADABLE:
            self._unreadable.add(key)
            log.warning("redis_key_unreadable", key=key, expected="a hash", server=self.config.where)

    @property
    def unreadable_keys(self) -> Collection[str]:
        """The keys that `unreadable` was called with."""
        return self._unreadable

    async def ready(self) -> None:
        """On Cluster, read which server has which slots; most commands do so themselves. Raises `IndexUnavailable`."""
        if self.is_cluster:
            with unavailable():
                await self._answer(cast("RedisCluster", self.client).initialize())

    async def server_id(self) -> str | None:
        """A unique id of the server process; None if the server does not report one. Raises `IndexUnavailable`."""
        if self.is_cluster:
            return None
        try:
            info = await self.ask(cast("Redis", self.client).info("server"))
        except IndexUnavailable as error:
            if isinstance(error.__cause__, ResponseError):
                return None
            raise
        return str(info["run_id"]) if "run_id" in info else None

    async def _load(self, script: Script) -> str:
        if self.is_cluster:
            await self._answer(cast("RedisCluster", self.client).initialize())
        return str(await self._answer(self.client.script_load(script.source)))

    async def _answer(self, answer: Any) -> Any:
        async with asyncio.timeout(REPLY_SECONDS):
            return await answer


def is_wrong_type(error: object) -> bool:
    """Whether the server answered that a key holds another type of value."""
    return isinstance(error, ResponseError) and str(error).startswith("WRONGTYPE")


def is_refused(error: IndexUnavailable) -> bool:
    """Whether the server has answered, and refuses this very command. It may take others, unlike a replica or a full one."""
    cause = error.__cause__
    return type(cause) is ResponseError and _STATE.match(str(cause)) is None


@contextmanager
def unavailable() -> Iterator[None]:
    """Turn the client's exceptions into `IndexUnavailable`, without the arguments of commands."""
    try:
        yield
    except (RedisError, RedisClusterException, OSError, TimeoutError) as error:
        raise IndexUnavailable(_error_line(error)) from error
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        # The client does not validate replies; malformed ones surface as these exceptions.
        raise IndexUnavailable(f"malformed reply: {type(error).__name__}") from error


def _error_line(error: BaseException) -> str:
    """The error in one line. Servers repeat the arguments of a command that they reject; these are cut off."""
    shortage = shortage_in(error)
    if shortage is not None:
        return f"cannot connect to Redis: {shortage}"
    unsaid = "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
    return (str(error) or unsaid).partition("\n")[0].partition(", with args")[0][:200]


def _client(config: RedisConfig) -> Client:
    common: dict[str, Any] = {
        "username": config.username,
        "password": config.password,
        "socket_connect_timeout": CONNECT_SECONDS,
        # The client would use `asyncio.wait_for`, which before Python 3.12 may lose a cancellation and with it the
        # caller's deadline. Every request made here has a deadline.
        "socket_timeout": None,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    tls = _tls(config)
    if config.cluster:
        return RedisCluster(
            host=config.host,
            port=cast("int", config.port),
            max_connections=config.connections,
            require_full_coverage=False,
            ssl=config.tls is not None,
            **{**common, "retry": Retry(NoBackoff(), 1)},  # one retry, because slots may have moved
            **tls,
        )
    if config.sentinels:
        sentinel = Sentinel(  # type: ignore[no-untyped-call]  # redis-py is not annotated here
            [split_address(address, path="$.redis.sentinels") for address in config.sentinels],
            sentinel_kwargs={
                "socket_connect_timeout": CONNECT_SECONDS,
                "socket_timeout": REPLY_SECONDS,
                "retry": Retry(NoBackoff(), 0),
                "username": config.sentinel_username,
                "password": config.sentinel_password,
                "ssl": config.tls is not None,
                **tls,
            },
        )
        pool = SentinelConnectionPool(  # type: ignore[no-untyped-call]  # nor here
            config.sentinel_service,
            sentinel,
            db=config.db,
            ssl=config.tls is not None,
            max_connections=config.connections,
            **common,
            **tls,
        )
        return Redis.from_pool(pool)
    if config.socket is not None:
        where: dict[str, Any] = {"connection_class": UnixDomainSocketConnection, "path": config.socket}
    else:
        kind = Connection if config.tls is None else SSLConnection
        where = {"connection_class": kind, "host": config.host, "port": config.port, "socket_keepalive": True}
    return Redis.from_pool(
        BlockingConnectionPool(
            max_connections=config.connections, timeout=REPLY_SECONDS, db=config.db, **where, **common, **tls
        )
    )


def _tls(config: RedisConfig) -> dict[str, Any]:
    if config.tls is None:
        return {}
    return {
        "ssl_ca_certs": config.tls.ca_file,
        "ssl_certfile": config.tls.cert_file,
        "ssl_keyfile": config.tls.key_file,
        "ssl_cert_reqs": "required" if config.tls.verify else "none",
        "ssl_check_hostname": config.tls.verify,
    }
