"""Real vLLM engines as processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.ports import consecutive_ports, free_port

from .model import tokenizer_of

START_SECONDS = 300.0
STOP_SECONDS = 20.0
NAME = "tiny"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line options of an engine."""

    block_size: int = 32
    blocks: int = 400
    """Blocks in the KV cache."""
    max_tokens: int = 8192
    """Tokens of the longest request, at most."""
    ranks: int = 1
    adapters: tuple[tuple[str, Path], ...] = ()
    """Names and folders."""
    reports_cached: bool = True
    """Its answers report how many prompt tokens it found in its cache."""
    parser: str = "pythonic"
    """Of tool calls."""
    topic: str = "kv-events"
    """Of its events."""
    arguments: tuple[str, ...] = ()
    """Further arguments of `vllm serve`."""
    path: Path | None = None
    """A folder with further Python modules."""


@dataclass(kw_only=True)
class Engine:
    """An engine that can be killed, and started again on the same ports."""

    executable: Path
    model: Path
    options: Options
    folder: Path
    """Has its log and caches."""
    core: int
    ports: Sequence[int] = field(default_factory=list)
    """Ports of the API, the events and the replays."""
    process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """Base URL of the API."""
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def events(self) -> str:
        """Where it publishes KV events."""
        return f"tcp://127.0.0.1:{self.ports[1]}"

    def replays_of(self, rank: int) -> str:
        """Where a rank replays KV events."""
        return f"tcp://127.0.0.1:{self.ports[2] + rank}"

    @property
    def log(self) -> Path:
        """The file with its output."""
        return logs_of(self.folder) / f"engine-{self.ports[0]}.log"

    async def start(self) -> None:
        """Start it and wait until it is healthy. Raises `RuntimeError` when it does not become so in time."""
        if not self.ports:
            self.ports = free_ports(self.options.ranks)
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                str(self.executable),
                *self.arguments(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment(),
                start_new_session=True,
            )
        began = time.monotonic()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
            while not await _is_healthy(session, self.url):
                if self.process.returncode is not None or time.monotonic() - began > START_SECONDS:
                    tail = self.log.read_text(errors="replace")[-3000:]
                    await self.stop(signal.SIGKILL)
                    raise RuntimeError(
                        f"expected a healthy engine within {START_SECONDS:.0f} s, but it did not start:\n{tail}"
                    )
                await asyncio.sleep(0.5)
        print(f"engine on port {self.ports[0]} up after {time.monotonic() - began:.0f} s", flush=True)

    async def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it and all its child processes."""
        if self.process is None:
            return
        process, self.process = self.process, None
        for each in (how, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, each)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_SECONDS):
                    await process.wait()
        ends = time.monotonic() + STOP_SECONDS  # a process that nobody reaps may remain, but has no ports
        while _group_exists(process.pid) and time.monotonic() < ends:
            await asyncio.sleep(0.05)

    def command(self, name: str) -> str:
        """What stands for `vllm serve NAME`: its small model under another name, without what differs between replicas."""
        options = self.options
        words = (
            *(self.executable, "serve", self.model, "--served-model-name", name),
            *("--tokenizer", tokenizer_of(self.model), "--enforce-eager", "--block-size", options.block_size),
            *("--num-gpu-blocks-override", options.blocks, "--max-model-len", options.max_tokens, "--max-num-seqs", 16),
        )
        return shlex.join(map(str, words))

    def arguments(self) -> Iterator[str]:
        """What follows the executable."""
        options, (api, events, replays) = self.options, self.ports
        events_config = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "topic": options.topic,
            "endpoint": f"tcp://*:{events}",
            "replay_endpoint": f"tcp://*:{replays}",
        }
        values: dict[str, Any] = {
            "served-model-name": NAME,
            "tokenizer": tokenizer_of(self.model),
            "host": "127.0.0.1",
            "port": api,
            "block-size": options.block_size,
            "num-gpu-blocks-override": options.blocks,
            "max-model-len": min(options.max_tokens, options.block_size * (options.blocks - 2)),
            "max-num-seqs": 16,
            "tool-call-parser": options.parser,
            "kv-events-config": json.dumps(events_config),
        }
        if options.ranks > 1:
            values["data-parallel-size"] = options.ranks
        yield from (
            "serve",
            str(self.model),
            "--enable-prefix-caching",
            "--enforce-eager",
            "--enable-auto-tool-choice",
        )
        if options.reports_cached:
            yield "--enable-prompt-tokens-details"
        for name, value in values.items():
            yield from (f"--{name}", str(value))
        if options.adapters:
            modules = (f"{name}={folder}" for name, folder in options.adapters)
            yield from ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", *modules)
        yield from options.arguments

    def environment(self) -> dict[str, str]:
        """Its environment variables."""
        binding = "|".join(map(str, range(self.options.ranks))) if self.options.ranks > 1 else str(self.core)
        path = {"PYTHONPATH": str(self.options.path)} if self.options.path is not None else {}
        return (
            os.environ
            | path
            | {
                "VLLM_CACHE_ROOT": str(self.folder / "cache"),
                "VLLM_CONFIG_ROOT": str(self.folder / "config"),
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": binding,
                "VLLM_SERVER_DEV_MODE": "1",
                "VLLM_NO_USAGE_STATS": "1",
                "DO_NOT_TRACK": "1",
                "HF_HUB_OFFLINE": "1",
            }
        )


def logs_of(folder: Path) -> Path:
    """The folder with the output of engines."""
    return folder / "logs"


@asynccontextmanager
async def running(engines: Sequence[Engine]) -> AsyncIterator[Sequence[Engine]]:
    """Start engines at the same time. They end with the context."""
    try:
        async with asyncio.TaskGroup() as group:
            for engine in engines:
                group.create_task(engine.start())
        yield engines
    finally:
        for engine in engines:
            await engine.stop()


def free_ports(ranks: int) -> list[int]:
    """A free port for the API, and two ports that each start a range of `ranks` free ones."""
    return [free_port(), consecutive_ports(ranks), consecutive_ports(ranks)]


async def _is_healthy(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(f"{url}/health") as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
