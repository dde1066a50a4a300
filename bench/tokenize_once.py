"""`python -m bench.tokenize_once`: a real vLLM engine that gets texts, and the same prompts as token ids, in turns.

Prompts are in the engine's cache already, so what is left before the first token is mostly what the ids save. Both
gateways tokenize; only one sends what it has made.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
from tests.vllm import workload
from tests.vllm.engine import NAME, Engine, Options, logs_of
from tests.vllm.engine import running as engines_running
from tests.vllm.install import executable
from tests.vllm.model import make_model
from tests.vllm.target import CHAT, COMPLETIONS, Target, gateway

from bench import report
from bench.measure import Figure
from matrixinfer.config import LogConfig
from matrixinfer.telemetry.log import configure

_SIZES = {"16 KiB": 16 * 1024, "64 KiB": 64 * 1024}
_PATHS = {"chat": CHAT, "text": COMPLETIONS}
_PROMPTS = 4
_ROUNDS = 30
_MOST_TO_PROVE = 200
_SETTLE_SECONDS = 0.05
RESULTS = Path(__file__).parent / "results" / "tokenize-once.json"


@dataclass
class Taken:
    """What requests of one kind took."""

    first_ms: list[float] = field(default_factory=list)
    front_ms: list[float] = field(default_factory=list)
    """CPU time of the engine's API server."""
    core_ms: list[float] = field(default_factory=list)
    """CPU time of the process that computes."""
    as_it_came: int = 0
    """Requests that were to carry token ids and did not, as they were sampled."""


def _body(path: str, text: str, **more: Any) -> dict[str, Any]:
    prompt = {"prompt": text} if path == COMPLETIONS else {"messages": [{"role": "user", "content": text}]}
    return {"model": NAME, "temperature": 0, "max_tokens": 1, **prompt, **more}


def _text(draw: random.Random, size: int) -> str:
    return workload.text(draw, size // 5)[:size]


def _cpu_ms(pid: int) -> float:
    """What all threads of a process have computed."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e6


def _core_of(pid: int) -> int:
    """The process that computes: the child that has computed most."""
    children = (Path(f"/proc/{pid}/task/{pid}/children").read_text()).split()
    return max(map(int, children), key=_cpu_ms)


class Lab:
    """One engine, and the gateways before it."""

    def __init__(self, engine: Engine, gateways: dict[str, Target], session: aiohttp.ClientSession) -> None:
        assert engine.process is not None
        self._front, self._core = engine.process.pid, _core_of(engine.process.pid)
        self._engine = engine
        self._gateways = gateways
        self._session = session
        self._draw = random.Random(1)

    async def prove(self, path: str) -> int:
        """Send new prompts until token ids are sent. Returns how many that took."""
        target = self._gateways["ids"]
        for number in range(_MOST_TO_PROVE):
            if await self._send(target, path, _text(self._draw, 2_000)):
                return number
            await asyncio.sleep(1.2)  # until the events of a sampled prompt have surely come
        raise RuntimeError("expected the gateway to send token ids, it did not: see its log")

    async def compare(self, path: str, size: int) -> dict[str, Taken]:
        """The same prompts in turns, each as a text and as token ids."""
        taken = {name: Taken() for name in self._gateways}
        prompts = [_text(self._draw, size) for _ in range(_PROMPTS)]
        for text in prompts:
            for target in self._gateways.values():
                await self._send(target, path, text)
        for number in range(_ROUNDS):
            order = sorted(self._gateways, reverse=bool(number % 2))
            for name in order:
                await self._measure(name, path, prompts[number % _PROMPTS], taken[name])
        return taken

    async def _measure(self, name: str, path: str, text: str, into: Taken) -> None:
        front, core, began = _cpu_ms(self._front), _cpu_ms(self._core), time.perf_counter()
        first = 0.0
        target = self._gateways[name]
        async with self._session.post(target.service.gateway.url + path, json=_body(path, text, stream=True)) as answer:
            assert answer.status == 200, await answer.text()
            async for _ in answer.content.iter_any():
                first = first or time.perf_counter() - began
        await asyncio.sleep(_SETTLE_SECONDS)
        if name == "ids" and not _sent_ids(target):
            into.as_it_came += 1
            return
        into.first_ms.append(first * 1e3)
        into.front_ms.append(_cpu_ms(self._front) - front)
        into.core_ms.append(_cpu_ms(self._core) - core)

    async def _send(self, target: Target, path: str, text: str) -> bool:
        async with self._session.post(target.service.gateway.url + path, json=_body(path, text)) as answer:
            assert answer.status == 200, await answer.text()
        return _sent_ids(target)


def _sent_ids(target: Target) -> bool:
    return next(target.service.state.decisions.newest()).sent_ids


async def _run(folder: Path, version: str) -> Sequence[Figure]:
    options = Options(blocks=1_200, max_tokens=30_000)
    engine = Engine(
        executable=executable(folder, version),
        model=make_model(folder / "model"),
        options=options,
        folder=folder,
        core=0,
    )
    logs_of(folder).mkdir(exist_ok=True)
    figures: list[Figure] = []
    async with AsyncExitStack() as stack:
        engines = await stack.enter_async_context(engines_running([engine]))
        gateways = {
            name: await stack.enter_async_context(gateway(engines, sends_ids=name == "ids")) for name in ("text", "ids")
        }
        session = await stack.enter_async_context(aiohttp.ClientSession())
        lab = Lab(engine, gateways, session)
        for kind, path in _PATHS.items():
            print(f"{kind}: token ids after {await lab.prove(path)} requests", flush=True)
            for name, size in _SIZES.items():
                figures.extend(_figures(f"{kind}, {name}", await lab.compare(path, size)))
    return figures


def _figures(case: str, taken: dict[str, Taken]) -> Iterator[Figure]:
    for name, each in taken.items():
        yield Figure(case=case, name=f"first byte, {name}", value=median(each.first_ms), unit="ms")
        yield Figure(case=case, name=f"least, {name}", value=min(each.first_ms), unit="ms")
        yield Figure(case=case, name=f"API server CPU, {name}", value=median(each.front_ms), unit="ms")
        yield Figure(case=case, name=f"engine core CPU, {name}", value=median(each.core_ms), unit="ms")
    yield Figure(case=case, name="sampled, without ids", value=taken["ids"].as_it_came, unit="")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tokenize_once", description=__doc__)
    parser.add_argument("--vllm", default="0.32.0", help="the version of vLLM")
    parser.add_argument("--vllm-dir", type=Path, default=Path(".vllm"), help="where it is installed")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    configure(LogConfig(level="error"))
    figures = asyncio.run(_run(args.vllm_dir.resolve(), args.vllm))
    report.publish({"tokenize once": list(figures)}, RESULTS, as_json=args.json)


if __name__ == "__main__":
    main()
