"""`matrixinfer demo --ui`: keeps simulated engines and conversations running, to be seen on the dashboard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import count

import aiohttp

from matrixinfer.app.service import Service
from matrixinfer.cli.events.sources import until_stopped
from matrixinfer.cli.terminal import Terminal, own_name
from matrixinfer.config import Config
from matrixinfer.errors import ConfigError
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.client import converse
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.server import SimEngine
from matrixinfer.sim.workload import WorkloadShape, conversations

THINK_SECONDS = 3.0
REPLY_TOKENS = 48


async def keep_running(
    engine: SimEngineConfig,
    engines: int,
    tokenizer: LocalTokenizer,
    shape: WorkloadShape,
    config_of: Callable[[Sequence[SimEngine]], Config],
    console: Terminal,
) -> None:
    """Hold one set of conversations after the other until a signal comes. Raises `ConfigError`."""
    async with AsyncExitStack() as stack:
        fleet = [await stack.enter_async_context(SimEngine(engine, tokenizer)) for _ in range(engines)]
        try:
            service = await stack.enter_async_context(Service(config_of(fleet)))
        except OSError as error:
            raise ConfigError(
                "--admin", f"cannot listen: {error}; name another address, such as 127.0.0.1:0"
            ) from error
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        _introduce(console, service, engines)
        async with until_stopped(None):
            for seed in count(shape.seed):
                await converse(
                    session,
                    service.gateway.url,
                    engine.model,
                    conversations(replace(shape, seed=seed)),
                    max_tokens=REPLY_TOKENS,
                    think_seconds=THINK_SECONDS,
                    on_outcome=lambda _: None,
                )


def _introduce(console: Terminal, service: Service, engines: int) -> None:
    """Say where to look, and for what."""
    admin = service.gateway.admin_url
    console.print(f"{engines} simulated engines hold conversations until Ctrl-C. Open the dashboard:")
    console.print(f"    {admin}/dashboard")
    console.print("Hit rate beside what round robin would have found: it rises as the conversations grow.")
    console.print("Click a decision to see what each pod held of its prompt, and an endpoint for its cache and load.")
    console.print("Why no hit? says where the rest is lost. Examine engines runs the doctor.")
    console.print(f"In another terminal: {own_name()} explain --follow --admin {admin}")
