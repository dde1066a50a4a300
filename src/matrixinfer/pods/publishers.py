"""Where an engine says that it publishes its KV events and its load, by the names of its data-parallel ranks. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from matrixinfer.config import KvEventsConfig
from matrixinfer.errors import UNREADABLE

MAX_RANKS = 1024
"""Engines with more data-parallel ranks are read up to here."""
_ANY_HOST = ("*", "0.0.0.0", "::", "[::]")  # noqa: S104 - read from engines, never bound
_MAX_PORT = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSource:
    """Where one data-parallel rank of an engine publishes (ZMQ)."""

    endpoint: str
    """Where KV events are published."""
    replay_endpoint: str | None = None
    topic: str | None = None
    """Only events with exactly this topic are read; None for all."""
    rank: int | None = None
    """The rank, as the engine calls it; None if it has no name."""
    load_endpoint: str | None = None
    """Where the load is published (SGLang)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What SGLang's `/server_info` says."""

    version: str | None
    ranks: int
    """Data-parallel ranks."""
    sources: tuple[KvSource, ...]


def configured_source(config: KvEventsConfig) -> KvSource:
    """The publisher that the configuration names."""
    return KvSource(endpoint=config.endpoint, replay_endpoint=config.replay_endpoint, topic=config.topic)


def parse_kv_sources(body: bytes, *, host: str) -> tuple[KvSource, ...]:
    """The publishers in vLLM's `/kv_event_sources`, in the order of their ranks; `host` replaces wildcard addresses.

    vLLM answers with a map from rank to source; a list whose entries say their rank (`data_parallel_rank`) is read too.
    Sources that are disabled, use another transport or are malformed are left out. So are those of several that have no
    rank or share one: it is not known whose cache they report.
    """
    try:
        answer: Any = msgspec.json.decode(body)
    except UNREADABLE:
        return ()
    entries: list[tuple[object, object]] = []
    if isinstance(answer, dict):
        entries = list(answer.items())
    elif isinstance(answer, list):
        entries = [(None, entry) for entry in answer]
    found = [source for name, entry in entries[:MAX_RANKS] if (source := _kv_source(name, entry, host)) is not None]
    return _by_rank(found)


def _kv_source(name: object, entry: object, host: str) -> KvSource | None:
    if not isinstance(entry, dict) or entry.get("enable_kv_cache_events") is False:
        return None
    endpoint, replay = entry.get("endpoint"), entry.get("replay_endpoint")
    if not isinstance(endpoint, str) or not endpoint or entry.get("publisher") not in (None, "zmq"):
        return None
    return KvSource(
        endpoint=_reachable(endpoint, host),
        replay_endpoint=_reachable(replay, host) if isinstance(replay, str) and replay else None,
        rank=next(
            (rank for given in (entry.get("data_parallel_rank"), name) if (rank := _rank(given)) is not None), None
        ),
    )


def _rank(given: object) -> int | None:
    if isinstance(given, str) and given.isascii() and given.isdecimal() and len(given) <= 4:
        return int(given)
    return given if isinstance(given, int) and not isinstance(given, bool) and 0 <= given <= 9999 else None


def _by_rank(found: list[KvSource]) -> tuple[KvSource, ...]:
    if len(found) < 2:
        return tuple(found)
    named = [(source.rank, source) for source in found if source.rank is not None]
    times = Counter(rank for rank, _ in named)
    return tuple(source for rank, source in sorted(named, key=lambda each: each[0]) if times[rank] == 1)


def parse_server_info(body: bytes, *, host: str) -> ServerInfo | None:
    """What SGLang's `/server_info` (in older releases `/get_server_info`) says; None if this is no answer of SGLang.

    The block `kv_events` names a base port, to which each rank's number is added. Releases without that block have the
    option `kv_events_config` in their arguments, from which the same follows.
    """
    try:
        info: Any = msgspec.json.decode(body)
    except UNREADABLE:
        return None
    if not isinstance(info, dict) or not info.keys() & {"kv_events", "kv_events_config", "internal_states"}:
        return None
    arguments = info["server_args"] if isinstance(info.get("server_args"), dict) else info
    block = info.get("kv_events")
    published = _described(block, host) if isinstance(block, dict) else ()
    ranks = _size(arguments.get("dp_size"))
    if "kv_events" not in info:
        published = _derived(arguments, host)
    version = info.get("version")
    return ServerInfo(
        version=version if isinstance(version, str) else None,
        ranks=max(ranks, len(published)),
        sources=published,
    )


def _described(block: Mapping[str, Any], host: str) -> tuple[KvSource, ...]:
    """The publishers in the block `kv_events`."""
    if block.get("publisher") != "zmq":
        return ()
    where = str(block.get("endpoint_host") or "*")
    events, replay, load = (_port(block.get(f"{name}endpoint_port_base")) for name in ("", "replay_", "load_"))
    return _ranks(_size(block.get("dp_size")), host if where in _ANY_HOST else where, events, replay, load)


def _derived(arguments: Mapping[str, Any], host: str) -> tuple[KvSource, ...]:
    """The publishers that follow from the option `kv_events_config`.

    Ranks without attention data parallelism all bound the same port in those releases, so that only one publishes.
    """
    try:
        config: Any = msgspec.json.decode(arguments.get("kv_events_config") or "null")
    except (TypeError, *UNREADABLE):
        return ()
    if not isinstance(config, dict) or config.get("publisher") != "zmq":
        return ()
    where, events = _address(config.get("endpoint") or "tcp://*:5557")
    _, replay = _address(config.get("replay_endpoint"))
    ranks = _size(arguments.get("dp_size")) if arguments.get("enable_dp_attention") else 1
    return _ranks(ranks, host if where in _ANY_HOST else where, events, replay, None)


def _ranks(count: int, host: str, events: int | None, replay: int | None, load: int | None) -> tuple[KvSource, ...]:
    def at(base: int | None, rank: int) -> str | None:
        return None if base is None or base + rank > _MAX_PORT else _tcp(host, str(base + rank))

    return tuple(
        KvSource(endpoint=endpoint, replay_endpoint=at(replay, rank), rank=rank, load_endpoint=at(load, rank))
        for rank in range(count)
        if (endpoint := at(events, rank)) is not None
    )


def _size(given: object) -> int:
    return min(given, MAX_RANKS) if isinstance(given, int) and given > 0 else 1


def _port(given: object) -> int | None:
    return given if isinstance(given, int) and 0 < given <= _MAX_PORT else None


def _address(endpoint: object) -> tuple[str, int | None]:
    """Host and port of a `tcp://` endpoint; no port if it is none."""
    scheme, _, address = endpoint.partition("://") if isinstance(endpoint, str) else ("", "", "")
    host, _, port = address.rpartition(":")
    if scheme != "tcp" or not port.isascii() or not port.isdecimal() or len(port) > 5:
        return "", None
    return host, _port(int(port))


def _reachable(endpoint: str, host: str) -> str:
    scheme, _, address = endpoint.partition("://")
    name, _, port = address.rpartition(":")
    return endpoint if scheme != "tcp" or name not in _ANY_HOST else _tcp(host, port)


def _tcp(host: str, port: str) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host and not host.startswith("[") else f"tcp://{host}:{port}"
