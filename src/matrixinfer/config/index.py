"""Where the index of blocks is kept: in memory, or in Redis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from msgspec import Meta

from matrixinfer.config.base import Count, Seconds, Section, described


class IndexConfig(Section, frozen=True):
    """The index: which pod holds which block."""

    kind: Annotated[
        Literal["memory", "redis"],
        described(
            "`memory` keeps the index in the gateway's own process. `redis` looks blocks up in the Redis or Valkey server of "
            "`$.redis`, with one round trip per request."
        ),
    ] = "memory"
    max_blocks: Annotated[
        Count,
        described(
            "Most distinct blocks kept in memory. Beyond it, the blocks stored longest ago are evicted, children first."
        ),
    ] = 4_000_000
    writer: Annotated[
        Literal["gateway", "agents", "none"],
        described(
            "Who writes what engines publish into Redis. `gateway`: this process follows the engines and writes, unless "
            "another process already writes for a pod. `agents`: `matrixinfer agent`, running beside the engines. `none`: "
            "writers of other projects, or nobody."
        ),
    ] = "agents"
    warm_start: Annotated[
        bool,
        described("With kind `memory`: start with what Redis knows, until each engine has replayed its own history."),
    ] = False
    max_age_seconds: Annotated[
        Seconds,
        described("How long an entry in Redis counts after it was written, if no running writer owns its pod."),
    ] = 86_400.0
    lease_seconds: Annotated[
        Annotated[float, Meta(ge=1)],
        described(
            "How long after a writer's last sign of life another writer may take over, and what it wrote becomes doubtful. "
            "The clocks of processes may differ by half of it."
        ),
    ] = 15.0
    reclaim_keys_per_second: Annotated[
        Annotated[int, Meta(ge=0)],
        described("How many keys per second a writer scans for entries that no longer count; 0 turns the scan off."),
    ] = 1_000


class TlsConfig(Section, frozen=True):
    """TLS to Redis. Relative paths start from the config file's folder."""

    ca_file: Annotated[str | None, described("Certificates to trust. By default, those that the system trusts.")] = None
    cert_file: Annotated[str | None, described("This client's certificate.")] = None
    key_file: Annotated[str | None, described("The key of this client's certificate.")] = None
    verify: Annotated[bool, described("Whether to check the server's certificate and name.")] = True


class RedisConfig(Section, frozen=True):
    """The Redis or Valkey through which processes share what they know: one server, a Sentinel group, or a Cluster."""

    host: Annotated[
        str | None,
        described("Host name or address. Default: the environment variable `REDIS_HOST`, else `127.0.0.1`."),
    ] = None
    port: Annotated[
        Annotated[int, Meta(ge=1, le=65_535)] | None,
        described("Default: the environment variable `REDIS_PORT`, else 6379."),
    ] = None
    socket: Annotated[str | None, described("Path of a Unix socket. Replaces host and port.")] = None
    sentinels: Annotated[
        tuple[str, ...],
        described("Addresses (`host:port`) of Sentinels, which name the master. Replaces host and port."),
    ] = ()
    sentinel_service: Annotated[str, described("The name by which the Sentinels know the master.")] = "mymaster"
    sentinel_username: Annotated[str | None, described("User name for the Sentinels.")] = None
    sentinel_password: Annotated[str | None, described("Password for the Sentinels. Never shown.")] = None
    cluster: Annotated[bool, described("Whether host and port are those of a Redis Cluster's node.")] = False
    db: Annotated[Annotated[int, Meta(ge=0)], described("Number of the database. A Cluster has only 0.")] = 0
    username: Annotated[str | None, described("User name for the server.")] = None
    password: Annotated[
        str | None,
        described("Password for the server. Never shown. Default: the environment variable `REDIS_PASSWORD`."),
    ] = None
    tls: Annotated[
        TlsConfig | None, described("TLS to the server and the Sentinels. `{}` turns it on with the defaults.")
    ] = None
    connections: Annotated[Count, described("Most connections to each server.")] = 32
    deadline_seconds: Annotated[
        Seconds, described("Deadline of a lookup. A request whose lookup takes longer is routed without the index.")
    ] = 0.02
    scripts: Annotated[
        bool,
        described(
            "Whether to look up with a script in the server, which takes a third of the time. With `false`, on a Cluster, "
            "and on servers that refuse scripts, lookups are a pipeline of reads."
        ),
    ] = True
    share_load: Annotated[
        bool,
        described("Whether to exchange with other gateways on the same server what was sent to which pod."),
    ] = True

    def __repr__(self) -> str:
        """Show no password."""
        return f"RedisConfig({self.where})"

    def __rich_repr__(self) -> Iterator[tuple[str, str]]:  # type: ignore[override]  # pairs are all that Rich needs
        """Show no password."""
        yield "where", self.where

    @property
    def where(self) -> str:
        """Address of the server, for people."""
        if self.socket is not None:
            return f"unix://{self.socket}"
        if self.sentinels:
            return f"{self.sentinel_service} of {', '.join(self.sentinels)}"
        return f"{self.host}:{self.port}"
