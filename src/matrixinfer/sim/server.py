"""The simulated engine as a server: ranks and HTTP API of one replica."""

from __future__ import annotations

import socket
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from aiohttp import web

from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.rank import EngineRank
from matrixinfer.sim.sglang_handlers import SglangHandlers
from matrixinfer.sim.stats import EngineStats
from matrixinfer.sim.vllm_handlers import VllmHandlers

_SHUTDOWN_SECONDS = 1.0


class SimEngine:
    """A replica that serves while its context is open. Several can share a process and a tokenizer."""

    def __init__(self, config: SimEngineConfig, tokenizer: LocalTokenizer) -> None:
        self.config = config
        self.ranks = tuple(EngineRank(config, number) for number in range(config.data_parallel_size))
        handlers = SglangHandlers if config.flavor == "sglang" else VllmHandlers
        self._handlers = handlers(config, tokenizer, self.ranks)
        self._stack = AsyncExitStack()
        self._port = config.port

    async def __aenter__(self) -> Self:
        """Open the ports and start. Raises `OSError` or `zmq.ZMQError` when a port is taken."""
        async with AsyncExitStack() as stack:
            for rank in self.ranks:
                await stack.enter_async_context(rank)
            listener = stack.enter_context(socket.create_server((self.config.host, self.config.port)))
            self._port = listener.getsockname()[1]
            # When a client disconnects, its handler must be cancelled: that aborts the request.
            runner = web.AppRunner(
                self._handlers.application(),
                handler_cancellation=True,
                access_log=None,
                shutdown_timeout=_SHUTDOWN_SECONDS,
            )
            stack.push_async_callback(runner.cleanup)
            await runner.setup()
            await web.SockSite(runner, listener).start()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    @property
    def url(self) -> str:
        """Base URL of the API, without `/v1`."""
        return f"http://{self.config.host}:{self._port}"

    @property
    def kv_endpoint(self) -> str:
        """Where the first rank publishes KV events."""
        return self.ranks[0].publisher.endpoint

    @property
    def replay_endpoint(self) -> str:
        """Where the first rank replays past KV events."""
        return self.ranks[0].publisher.replay_endpoint

    @property
    def stats(self) -> EngineStats:
        """The counters of all ranks together."""
        return EngineStats.total(rank.stats for rank in self.ranks)

    def restart(self) -> None:
        """Restart on the same endpoints, as a new process would. Raises `RuntimeError` unless idle."""
        for rank in self.ranks:
            rank.restart()
