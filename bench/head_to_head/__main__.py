"""`python -m bench.head_to_head`: routers in front of two real vLLM engines, undisturbed and disturbed, in turns.

The engines run on a CPU, each on a core, with a model of random weights: answers mean nothing, caches and waits are real.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from statistics import mean

import aiohttp
from tests.vllm.engine import NAME, Engine, Options, free_ports, logs_of
from tests.vllm.engine import running as engines_running
from tests.vllm.install import executable
from tests.vllm.model import Shape, make_model

from bench import report
from bench.head_to_head.driver import Driver, Run
from bench.head_to_head.routers import BLOCK, Command, commands
from bench.head_to_head.simulated import SimulatedEngine, python
from bench.head_to_head.workload import Conversation, conversations
from bench.measure import Figure
from bench.peers.routers import OURS, PEERS, running
from matrixinfer.scheduler.policies import POLICIES

_SHAPE = Shape(hidden=256, layers=24, heads=4, kv_heads=2, inner=1024)
"""Prefill of 2,000 tokens takes about a second."""
_BLOCKS = 640
"""Of each cache: half of the working set."""
_RESET_SECONDS = 60.0
_AFTER = 64
"""Requests that are over before something happens."""
RESULTS = Path(__file__).parents[1] / "results" / "head-to-head.json"
SIMULATED = RESULTS.with_name("head-to-head-simulated.json")


class Lab:
    """Two engines, and what is done to them."""

    def __init__(self, engines: Sequence[Engine], folder: Path, session: aiohttp.ClientSession) -> None:
        self._engines = engines
        self._folder = folder
        self._session = session

    async def run(self, scenario: str, command: Command, talk: Sequence[Conversation]) -> Run:
        """One run of a scenario through one router, from empty caches."""
        for engine in self._engines:
            await self._reset(engine)
        return await _SCENARIOS[scenario](self, command, talk)

    async def steady(self, command: Command, talk: Sequence[Conversation]) -> Run:
        """Nothing happens."""
        run = Run()
        async with self._routers(command, 1) as urls:
            await Driver(self._session, urls, NAME).hold(talk, run)
        return run

    async def restart(self, command: Command, talk: Sequence[Conversation]) -> Run:
        """The router is restarted beside warm engines. Only what follows counts."""
        async with self._routers(command, 1) as urls:
            await Driver(self._session, urls, NAME).hold(talk, Run(), slice(0, 4))
        run = Run()
        async with self._routers(command, 1) as urls:
            await Driver(self._session, urls, NAME).hold(talk, run, slice(4, None))
        return run

    async def two(self, command: Command, talk: Sequence[Conversation]) -> Run:
        """Requests go to two routers in turns."""
        run = Run()
        async with self._routers(command, 2) as urls:
            await Driver(self._session, urls, NAME).hold(talk, run)
        return run

    async def reset(self, command: Command, talk: Sequence[Conversation]) -> Run:
        """One engine loses its cache in the middle."""
        return await self._disturbed(command, talk, lambda: self._reset(self._engines[0]))

    async def kill(self, command: Command, talk: Sequence[Conversation]) -> Run:
        """One engine is killed in the middle, and started again at once."""
        engine = self._engines[1]
        starting: list[asyncio.Task[None]] = []

        async def act() -> None:
            await engine.stop(signal.SIGKILL)
            starting.append(asyncio.create_task(engine.start()))

        try:
            return await self._disturbed(command, talk, act)
        finally:
            await asyncio.gather(*starting)

    async def _disturbed(
        self, command: Command, talk: Sequence[Conversation], act: Callable[[], Awaitable[None]]
    ) -> Run:
        run = Run(when=(_AFTER, act))
        async with self._routers(command, 1) as urls:
            await Driver(self._session, urls, NAME).hold(talk, run)
        return run

    @asynccontextmanager
    async def _routers(self, command: Command, number: int) -> AsyncIterator[list[str]]:
        urls = [engine.url for engine in self._engines]
        with ExitStack() as stack:
            started = [
                await asyncio.to_thread(
                    stack.enter_context, running(f"router-{each}", self._folder, urls, command, model=NAME)
                )
                for each in range(number)
            ]
            try:
                yield [router.url for router in started]
            finally:
                await asyncio.to_thread(stack.close)

    async def _reset(self, engine: Engine) -> None:
        """Empty a cache. An idle engine publishes that with its next step, so it gets one."""
        path = f"{engine.url}/reset_prefix_cache?reset_running_requests=true"
        async with self._session.post(path, raise_for_status=True) as answer:
            await answer.read()
        body = {"model": NAME, "prompt": "Hello", "max_tokens": 1}
        async with self._session.post(f"{engine.url}/v1/completions", json=body, raise_for_status=True) as answer:
            await answer.read()


_SCENARIOS: Mapping[str, Callable[[Lab, Command, Sequence[Conversation]], Awaitable[Run]]] = {
    "steady": Lab.steady,
    "router restarted": Lab.restart,
    "two routers": Lab.two,
    "cache reset": Lab.reset,
    "engine killed": Lab.kill,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print tables, and write `bench/results/head-to-head.json`."""
    parser = argparse.ArgumentParser(prog="python -m bench.head_to_head", description=__doc__)
    parser.add_argument("--vllm", default=os.environ.get("VLLM", "0.32.0"), help="version (default: %(default)s)")
    parser.add_argument("--vllm-dir", type=Path, default=Path(os.environ.get("VLLM_DIR", ".vllm")))
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="where the other routers are installed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--conversations", type=int, default=24)
    parser.add_argument("--blocks", type=int, default=_BLOCKS, help="of each cache (default: %(default)s)")
    parser.add_argument("--simulated", action="store_true", help="simulated engines in the place of the real ones")
    parser.add_argument("--all-policies", action="store_true", help="all policies of ours, not only two")
    parser.add_argument("--only", action="append", choices=_SCENARIOS, metavar="SCENARIO")
    parser.add_argument("--routers", default="", metavar="TEXT,…", help="only routers whose names contain a TEXT")
    args = parser.parse_args(argv)
    args.peers.mkdir(parents=True, exist_ok=True)
    for peer in PEERS:
        peer.install(args.peers)
    figures = asyncio.run(_run(args))
    report.publish(figures, SIMULATED if args.simulated else RESULTS, as_json=False)
    return 0


async def _run(args: argparse.Namespace) -> dict[str, list[Figure]]:
    folder: Path = args.vllm_dir.resolve()
    logs_of(folder).mkdir(parents=True, exist_ok=True)
    model = make_model(folder / "model-slow", _SHAPE)
    options = Options(block_size=BLOCK, blocks=args.blocks, topic="", arguments=("--enable-scale-out",))
    kind = SimulatedEngine if args.simulated else Engine
    engines = [
        kind(
            executable=python() if args.simulated else executable(folder, args.vllm),
            model=model,
            options=options,
            folder=folder,
            core=core,
            ports=free_ports(1),
        )
        for core in range(2)
    ]
    policies = [each for each in POLICIES if each != "kv_aware"] if args.all_policies else ["round_robin"]
    chosen = {
        name: command
        for name, command in commands(engines, policies).items()
        if any(text in name for text in args.routers.split(","))
    }
    talk = conversations(args.seed, per_group=max(1, args.conversations // 4))
    results: dict[str, dict[str, list[Run]]] = {}
    timeout = aiohttp.ClientTimeout(total=_RESET_SECONDS)  # requests have their own
    async with (
        engines_running(engines),
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session,
    ):
        lab = Lab(engines, args.peers.resolve(), session)
        for scenario in args.only or _SCENARIOS:
            names = list(chosen)
            for number in range(args.rounds):
                for name in names if number % 2 == 0 else reversed(names):
                    run = await lab.run(scenario, chosen[name], talk)
                    results.setdefault(scenario, {}).setdefault(name, []).append(run)
                    print(_line(scenario, name, number, run), file=sys.stderr, flush=True)
    return {scenario: list(_figures(runs)) for scenario, runs in results.items()}


def _line(scenario: str, name: str, number: int, run: Run) -> str:
    return (
        f"{scenario}, round {number + 1}, {name}: hit rate {run.hit_rate:.3f}, TTFT {run.ttft_ms:,.0f} ms on average, "
        f"{run.p90_ms:,.0f} ms p90, {len(run.answers)} answers, {len(run.errors)} errors {sorted(set(run.errors))}"
    )


def _figures(runs: Mapping[str, Sequence[Run]]) -> Iterator[Figure]:
    times = {name: mean(run.ttft_ms for run in each) for name, each in runs.items()}
    rivals = [value for name, value in times.items() if not name.startswith(OURS)]
    best = min(rivals, default=times.get(OURS, float("nan")))
    for name, each in runs.items():
        yield Figure(case=name, name="hit rate", value=mean(run.hit_rate for run in each), unit="")
        yield Figure(case=name, name="mean TTFT", value=times[name], unit="ms")
        yield Figure(case=name, name="p90 TTFT", value=mean(run.p90_ms for run in each), unit="ms")
        yield Figure(case=name, name="mean / best rival", value=times[name] / best, unit="×")
        yield Figure(case=name, name="errors", value=float(sum(len(run.errors) for run in each)), unit="")


if __name__ == "__main__":
    sys.exit(main())
