"""Reads an engine's HTTP API: its model names, its publishers of KV events and its load. Supports vLLM and SGLang."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from matrixinfer.config import KvEventsConfig
from matrixinfer.errors import UNREADABLE, MatrixInferError, client_error
from matrixinfer.pods.registry import EngineMetrics, RankMetrics, ServedNames

MAX_BODY_BYTES = 16 * 1024 * 1024
"""Longer answers are refused. The longest, vLLM's `/metrics`, has about 200 KB."""

_RUNNING = (b"vllm:num_requests_running", b"sglang:num_running_reqs")
_WAITING = (b"vllm:num_requests_waiting", b"sglang:num_queue_reqs")
_CACHE_USAGE = (b"vllm:kv_cache_usage_perc", b"vllm:gpu_cache_usage_perc", b"sglang:token_usage")
_PREFIX_HITS = (b"vllm:prefix_cache_hits_total", b"vllm:gpu_prefix_cache_hits_total")
_LOADED = (b"vllm:external_prefix_cache_hits_total",)
"""Hits on slower tiers, which vLLM counts separately."""
_PREFIX_QUERIES = (b"vllm:prefix_cache_queries_total", b"vllm:gpu_prefix_cache_queries_total")
_STARTED = (b"process_start_time_seconds",)
_CACHE = re.compile(rb"\n(?:vllm|sglang):cache_config_info\{([^\n]*)")
_BLOCK_SIZE = re.compile(rb'\b(?:block|page)_size="([1-9]\d{0,8})"')
_PREFIX_CACHING = re.compile(rb'\benable_prefix_caching="(True|False)"')
_RANK = re.compile(rb'[{,](?:engine|dp_rank)="(\d{1,4})"')
"""The label of data-parallel ranks in vLLM and in SGLang."""
_Sample = tuple[int | None, float]
"""Rank and value."""
_ANY_HOST = ("*", "0.0.0.0", "[::]")  # noqa: S104 - read from engines, never bound


class EngineDown(MatrixInferError):
    """The engine cannot be reached, does not answer in time, or answers with a server error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An engine's answer to a GET that is not a server error."""

    status: int
    body: bytes
    date: str | None
    """Its `Date` header: the time on the engine's clock, in seconds."""


class EngineApi:
    """Reads the HTTP APIs of engines, each request within `timeout_seconds`. Every method may raise `EngineDown`."""

    def __init__(self, session: aiohttp.ClientSession, timeout_seconds: float) -> None:
        self._session = session
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)

    async def models(self, url: str) -> ServedNames | None:
        """The model names that the engine serves; None if it does not report them (it may require an API key)."""
        body = await self._get(f"{url}/v1/models")
        return None if body is None else parse_models(body)

    async def kv_sources(self, url: str) -> tuple[KvEventsConfig, ...]:
        """Its publishers of KV events, one per data-parallel rank; empty if it has none or does not report them."""
        body = await self._get(f"{url}/kv_event_sources")
        return () if body is None else parse_kv_sources(body, host=urlsplit(url).hostname or "")

    async def check(self, url: str) -> None:
        """Check `/health`. Any answer but a server error counts as healthy, because some engines lack that path."""
        await self._get(f"{url}/health")

    async def metrics(self, url: str, *, now: float) -> EngineMetrics:
        """Its load; every value is None if it exports no metrics. `now` is the time of the reading, in seconds."""
        return parse_metrics(await self._get(f"{url}/metrics") or b"", read_at=now)

    async def _get(self, url: str) -> bytes | None:
        """The body of a 200 answer; None for any other status, such as 401 or 404."""
        answer = await self.ask(url)
        return answer.body if answer.status == 200 else None

    async def ask(self, url: str) -> Answer:
        """GET `url`. The body is read only if the status is 200. Raises `EngineDown`."""
        try:
            async with self._session.get(url, timeout=self._timeout, allow_redirects=False) as response:
                if response.status >= 500:
                    raise EngineDown(f"{url} answered {response.status}")
                date = response.headers.get("Date")
                if response.status != 200:
                    return Answer(status=response.status, body=b"", date=date)
                chunks, size = [], 0
                async for chunk in response.content.iter_any():
                    size += len(chunk)
                    if size > MAX_BODY_BYTES:
                        raise EngineDown(f"{url} answered with more than {MAX_BODY_BYTES} bytes")
                    chunks.append(chunk)
                return Answer(status=200, body=b"".join(chunks), date=date)
        except TimeoutError as error:
            raise EngineDown(f"{url} did not answer in time") from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineDown(f"{url}: {client_error(error)}") from error


class _Card(msgspec.Struct):
    id: str
    parent: str | None = None
    owned_by: str | None = None
    max_model_len: Any = None


class _Version(msgspec.Struct):
    version: str


class _Cards(msgspec.Struct):
    data: list[_Card]


def parse_models(body: bytes) -> ServedNames | None:
    """The names in an engine's `/v1/models`; None if the answer is malformed or names no base model.

    Entries with a parent are adapters. All others are names of the same model; the first is the engine's own.
    """
    try:
        cards = msgspec.json.decode(body, type=_Cards).data
    except UNREADABLE:
        return None
    own = [card for card in cards if card.parent is None]
    if not own:
        return None
    adapters = {card.id: card.parent for card in cards if card.parent is not None}
    return ServedNames(
        base_model=own[0].id,
        aliases=frozenset(card.id for card in own),
        adapters=adapters,
        engine=own[0].owned_by,
        context_length=length if isinstance(length := own[0].max_model_len, int) else None,
    )


def parse_version(body: bytes) -> str | None:
    """The version in an engine's `/version`; None if the answer is malformed."""
    try:
        return msgspec.json.decode(body, type=_Version).version
    except UNREADABLE:
        return None


def parse_kv_sources(body: bytes, *, host: str) -> tuple[KvEventsConfig, ...]:
    """The publishers in an engine's `/kv_event_sources`, by rank; `host` replaces wildcard addresses.

    vLLM 0.32 answers with a map from rank to source, later releases with a list. Sources that are disabled, use another
    transport or are malformed are left out.
    """
    try:
        answer: Any = msgspec.json.decode(body)
    except UNREADABLE:
        return ()
    if isinstance(answer, dict):
        answer = [answer[rank] for rank in sorted(answer, key=lambda rank: (len(rank), rank))]
    if not isinstance(answer, list):
        return ()
    return tuple(source for source in (_kv_source(entry, host) for entry in answer) if source is not None)


def _kv_source(entry: object, host: str) -> KvEventsConfig | None:
    if not isinstance(entry, dict) or entry.get("enable_kv_cache_events") is False:
        return None
    endpoint, replay = entry.get("endpoint"), entry.get("replay_endpoint")
    if not isinstance(endpoint, str) or not endpoint or entry.get("publisher") not in (None, "zmq"):
        return None
    return KvEventsConfig(
        endpoint=_reachable(endpoint, host),
        replay_endpoint=_reachable(replay, host) if isinstance(replay, str) and replay else None,
    )


def _reachable(endpoint: str, host: str) -> str:
    scheme, _, address = endpoint.partition("://")
    name, _, port = address.rpartition(":")
    if scheme != "tcp" or name not in _ANY_HOST:
        return endpoint
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def parse_metrics(text: bytes, *, read_at: float) -> EngineMetrics:
    """The load in a Prometheus exposition: request counts summed over all series (ranks, models), the highest cache usage.

    It searches for the few names it needs instead of parsing the whole text, which takes 30 µs for 200 KB.
    """
    series = [_values(text, names) for names in (_RUNNING, _WAITING, _CACHE_USAGE, _PREFIX_HITS, _PREFIX_QUERIES)]
    if series[3]:
        series[3] += _values(text, _LOADED)
    whole = _summed(*series)
    ranks = sorted({rank for values in series for rank, _ in values if rank is not None})
    cache = _CACHE.search(text)
    block_size = _BLOCK_SIZE.search(cache[1]) if cache else None
    caching = _PREFIX_CACHING.search(cache[1]) if cache else None
    return EngineMetrics(
        running=whole.running,
        waiting=whole.waiting,
        cache_usage=whole.cache_usage,
        read_at=read_at,
        prefix_hits=whole.prefix_hits,
        prefix_queries=whole.prefix_queries,
        block_size=int(block_size[1]) if block_size else None,
        prefix_caching=caching[1] == b"True" if caching else None,
        started_at=max((at for _, at in _values(text, _STARTED) if at > 0), default=None),
        ranks={
            rank: _summed(*([each for each in values if each[0] == rank] for values in series))
            for rank in (ranks if len(ranks) > 1 else ())
        },
    )


def _summed(
    running: Sequence[_Sample],
    waiting: Sequence[_Sample],
    usage: Sequence[_Sample],
    hits: Sequence[_Sample],
    queries: Sequence[_Sample],
) -> RankMetrics:
    return RankMetrics(
        running=_sum(running),
        waiting=_sum(waiting),
        cache_usage=max(value for _, value in usage) if usage else None,
        prefix_hits=_sum(hits),
        prefix_queries=_sum(queries),
    )


def _sum(samples: Sequence[_Sample]) -> int | None:
    total = sum(value for _, value in samples)
    return round(total) if samples and math.isfinite(total) else None


def _values(text: bytes, names: tuple[bytes, ...]) -> list[_Sample]:
    """The rank and value of every series with the first of `names` that occurs in the text."""
    for name in names:
        values = []
        start = -1
        while (start := text.find(name, start + 1)) >= 0:
            end = text.find(b"\n", start)
            stop = len(text) if end < 0 else end
            value = _value(text, start, start + len(name), stop)
            if value is not None:
                rank = _RANK.search(text, start, stop)
                values.append((int(rank[1]) if rank else None, value))
        if values:
            return values
    return []


def _value(text: bytes, start: int, after_name: int, end: int) -> float | None:
    """The value of the sample line at `start`; None if no sample with exactly that name starts there."""
    if (start and text[start - 1 : start] != b"\n") or text[after_name : after_name + 1] not in (b"{", b" "):
        return None
    # Label values may contain spaces and braces, but the text after the last brace does not.
    fields = text[max(after_name, text.rfind(b"}", after_name, end) + 1) : end].split()
    try:
        value = float(fields[0])
    except (IndexError, ValueError):
        return None
    return value if math.isfinite(value) else None
