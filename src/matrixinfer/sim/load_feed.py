"""The load of a rank, published over ZMQ as SGLang does with `--load-publish-endpoint`.

PUB frames are `[topic, seq, payload]`, like those of KV events, with the topic `load` and a payload
`["LoadStat", running, waiting, tokens, …]` in msgpack. There is no replay: each frame has the whole load.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import msgspec
import zmq

from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.stats import EngineStats

TOPIC = "load"
_HIGH_WATER_MARK = 8
_INTERVAL_SECONDS = 0.02
"""SGLang looks every fifth step, and whenever it becomes idle."""
_HEARTBEAT_SECONDS = 1.0


class LoadStat(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The load of one rank, with SGLang's names."""

    num_running_reqs: int
    num_waiting_reqs: int
    num_tokens: int
    max_total_num_tokens: int
    attn_dp_rank: int
    num_waiting_uncached_tokens: int
    num_total_tokens: int
    max_running_requests: int
    total_prefill_uncached_tokens: int
    total_prefill_busy_us: int


class LoadFeed:
    """Publishes while its context is open and `run` is running: every change, and every second what has not changed."""

    def __init__(self, config: SimEngineConfig, rank: int, read: Callable[[], EngineStats], port: int) -> None:
        self._config = config
        self._rank = rank
        self._read = read
        self._port = port
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Raises `zmq.ZMQError` when the port is taken."""
        with ExitStack() as stack:
            context = zmq.Context()
            stack.callback(context.term)
            self._pub = context.socket(zmq.PUB)
            stack.callback(self._pub.close, linger=0)
            self._pub.set_hwm(_HIGH_WATER_MARK)
            self._pub.bind(f"tcp://{self._config.host}:{self._port}")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def endpoint(self) -> str:
        """Where to subscribe."""
        return self._pub.getsockopt_string(zmq.LAST_ENDPOINT)

    async def run(self) -> None:
        """Publish until cancelled."""
        sent, sent_at, number = None, 0.0, 0
        while True:
            stat, now = self._stat(), time.monotonic()
            if stat != sent or now - sent_at >= _HEARTBEAT_SECONDS:
                frames = [TOPIC.encode(), number.to_bytes(8, "big"), msgspec.msgpack.encode(stat)]
                self._pub.send_multipart(frames, zmq.NOBLOCK)
                sent, sent_at, number = stat, now, number + 1
            await asyncio.sleep(_INTERVAL_SECONDS)

    def _stat(self) -> LoadStat:
        stats = self._read()
        missing = 1 - stats.prefix_hits / stats.prefix_queries if stats.prefix_queries else 1.0
        return LoadStat(
            num_running_reqs=stats.running,
            num_waiting_reqs=stats.waiting,
            num_tokens=stats.used_tokens,
            max_total_num_tokens=self._config.cache_tokens,
            attn_dp_rank=self._rank,
            num_waiting_uncached_tokens=int(stats.waiting_tokens * missing),
            num_total_tokens=stats.used_tokens + stats.waiting_tokens,
            max_running_requests=self._config.max_sequences,
            total_prefill_uncached_tokens=stats.computed_prompt_tokens,
            total_prefill_busy_us=int(stats.prefill_seconds * 1e6),
        )
