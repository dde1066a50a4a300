"""Time to the first byte of growing conversations, by where the gateway's token ids come from."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import Any

import aiohttp

from bench.measure import Figure, Scale, ratio
from bench.prompts import MODEL, prose, tokenizer_path
from matrixinfer.app.service import Service
from matrixinfer.config import Config, LogConfig, PodConfig, SchedulerConfig, TokenizationConfig, checked
from matrixinfer.prompt.chat_template import CHATML
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.prompt.openai import CHAT_PATH
from matrixinfer.scheduler.policies import with_policy
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.model import Timing
from matrixinfer.sim.server import SimEngine
from matrixinfer.telemetry.log import configure

_ENGINE = SimEngineConfig(
    model=f"bench/{MODEL}",
    served_model_names=(MODEL,),
    num_blocks=20_000,
    timing=Timing(step=0.002, prefill_token=0.0002, decode_sequence=0.0001),
    tokenize_seconds=0.1,
)
_ROUNDS = 4
_PODS = 4
_TURNS = 5
_TURN_CHARS = 3_000
_WAITS_MS = 2_000.0
_TARGET = 1.1
_FINDING_SECONDS = 60

_ASKS = TokenizationConfig(find="none")
_MODES: Mapping[str, tuple[TokenizationConfig, str]] = MappingProxyType(
    {
        "guessed": (_ASKS, "cache_aware"),
        "found": (TokenizationConfig(), "kv_aware"),
        "asked": (_ASKS, "kv_aware"),
        "asked, waiting": (TokenizationConfig(find="none", wait_milliseconds=_WAITS_MS), "kv_aware"),
    }
)
"""Settings and profile. The last one waits for every answer, as a gateway must that cannot route without token ids."""


def run(scale: Scale) -> Iterator[Figure]:
    """Mean time to the first byte per mode, and compared with a gateway that only guesses."""
    configure(LogConfig(level="error"))
    tokenizer = LocalTokenizer.load(tokenizer_path(), "chatml")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HUB_CACHE"] = folder
        _fill(Path(folder))
        rounds = _ROUNDS if scale.feed_rounds > 1 else 1
        times = asyncio.run(_measure(tokenizer, rounds, scale.sessions))
    for mode, seconds in times.items():
        target = _TARGET if mode in ("found", "asked") else None
        yield Figure(case=mode, name="first byte", value=min(seconds) * 1e3, unit="ms")
        yield Figure(case=mode, name="against guessed", value=ratio(seconds, times["guessed"]), unit="×", target=target)


def _fill(cache: Path) -> None:
    """Put the engines' tokenizer into a Hugging Face cache."""
    snapshot = cache / f"models--bench--{MODEL}" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    shutil.copy(tokenizer_path() / "tokenizer.json", snapshot)
    (snapshot / "chat_template.jinja").write_text(CHATML, encoding="utf-8")


async def _measure(tokenizer: LocalTokenizer, rounds: int, sessions: int) -> dict[str, list[float]]:
    """Mean seconds to the first byte, by mode and round. No engine has seen the conversations before."""
    times: dict[str, list[float]] = {mode: [] for mode in _MODES}
    async with AsyncExitStack() as stack:
        services = {mode: await _gateway(stack, tokenizer, mode) for mode in _MODES}
        session = await stack.enter_async_context(aiohttp.ClientSession())
        await _until_found(services["found"])
        for number in range(rounds):
            for mode, service in services.items():
                starting = (
                    _talk(session, service.gateway.url, each, number * sessions + each) for each in range(sessions)
                )
                talks = await asyncio.gather(*starting)
                times[mode].append(mean(seconds for talk in talks for seconds in talk))
    return times


async def _gateway(stack: AsyncExitStack, tokenizer: LocalTokenizer, mode: str) -> Service:
    """A gateway with engines of its own."""
    tokenization, policy = _MODES[mode]
    engines = [await stack.enter_async_context(SimEngine(_ENGINE, tokenizer)) for _ in range(_PODS)]
    config = Config(
        listen="127.0.0.1:0",
        admin=None,
        pods=tuple(PodConfig(name=f"pod-{i}", url=engine.url) for i, engine in enumerate(engines)),
        tokenization=tokenization,
        scheduler=with_policy(SchedulerConfig(), policy),
    )
    return await stack.enter_async_context(Service(checked(config)))


async def _until_found(service: Service) -> None:
    """Wait until the gateway renders chats itself. Raises `TimeoutError`."""
    body = b'{"model": "%s", "messages": [{"role": "user", "content": "hello"}]}' % MODEL.encode()
    for _ in range(_FINDING_SECONDS * 20):
        timings: Any = (await service.router.explain(CHAT_PATH, body))["timings_ms"]
        if "render" in timings:
            return
        await asyncio.sleep(0.05)
    raise TimeoutError("the gateway did not find the tokenizer")


async def _talk(session: aiohttp.ClientSession, url: str, place: int, seed: int) -> list[float]:
    """One conversation, which starts after those before it: its times to the first byte."""
    await asyncio.sleep(0.05 * place)
    text, messages, times = prose(seed + 1, _TURNS * _TURN_CHARS), [], []
    for turn in range(_TURNS):
        content = text[turn * _TURN_CHARS : (turn + 1) * _TURN_CHARS]
        messages.append({"role": "user", "content": content})
        start = time.perf_counter()
        body = {"model": MODEL, "messages": messages, "stream": True, "max_tokens": 4}
        async with session.post(url + CHAT_PATH, json=body, raise_for_status=True) as response:
            await response.content.readany()
            times.append(time.perf_counter() - start)
            await response.read()
        messages.append({"role": "assistant", "content": "Go on."})
        await asyncio.sleep(0.2)
    return times
