"""What the dashboard costs the gateway: counting requests always, and following them while a page is open."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, nullcontext
from statistics import median

import aiohttp
import msgspec
import uvloop

from bench.fleet import registry_of
from bench.measure import Figure, Scale, cpu_seconds, rounds_of
from bench.prompts import chat
from matrixinfer.config import OutliersConfig
from matrixinfer.dashboard.fleet import Fleet
from matrixinfer.dashboard.history import History
from matrixinfer.dashboard.live import About, Live
from matrixinfer.pods.outliers import Outliers
from matrixinfer.pods.registry import EngineMetrics
from matrixinfer.prompt.openai import CHAT_PATH
from matrixinfer.routing.decision_log import DecisionLog, Record, record
from matrixinfer.scheduler.framework import Candidate, Condition, Decision, SchedulingRequest
from matrixinfer.traffic.load import LoadLedger
from matrixinfer.trust.cache_views import FeedCaches

_PER_SECOND = 200
_BLOCK = 128
_BLOCKS = 128
"""Of a chat of about 64 KiB."""
_TARGET = 3.0


def run(scale: Scale) -> Iterator[Figure | str]:
    """Microseconds per request to count it; and a gateway's CPU time at a steady rate, without and with an open page."""
    yield "counting"
    counted = _counting()
    (times,) = rounds_of(counted, scale=scale)
    yield Figure(case="chat of 64 KiB, 8 pods", name="counted", value=min(times) * 1e6, unit="µs")
    for pods in (4, 200):
        yield f"a page, {pods} pods"
        (times,) = rounds_of(_page_of(pods), scale=scale)
        with ExitStack() as stack:
            upstream = _line(stack.enter_context(_process("upstream")))[0]
            process = stack.enter_context(_process("dashboard", upstream, str(pods)))
            api, admin = _line(process)
            closed, opened = uvloop.run(_rounds(api, admin, process.pid, scale))
        case = f"{_PER_SECOND} requests per second, {pods} pods"
        yield Figure(case=case, name="CPU, no page", value=median(closed) * 100, unit="% of a core")
        yield Figure(case=case, name="CPU, one page", value=median(opened) * 100, unit="% of a core")
        more = [(there - here) / here for here, there in zip(closed, opened, strict=True)]
        yield Figure(case=case, name="more with a page", value=median(more) * 100, unit="%")
        yield Figure(case=case, name="an event", value=min(times) * 1e3, unit="ms")
        share = min(times) / median(closed) * 100  # one event a second
        yield Figure(case=case, name="events, of the CPU", value=share, unit="%", target=_TARGET)


def _counting() -> Callable[[], None]:
    """Counts one request after another, whose prompts share a beginning."""
    history, log = History(time.monotonic), DecisionLog(1_000)
    made = _fill(history, log)
    turn = iter(range(1 << 62))

    def count() -> None:
        decision, kept = made[next(turn) % len(made)]
        history.decided(kept, decision)
        history.ended(kept)

    return count


def _fill(history: History, log: DecisionLog) -> list[tuple[Decision, Record]]:
    """Count some requests and log their decisions."""
    draw = random.Random(1)
    candidates = [
        Candidate(name=f"pod-{at}", url="", condition=Condition(prefill_rate=9e3, cache_tokens=1_000_000))
        for at in range(8)
    ]
    shared = [draw.getrandbits(62) for _ in range(_BLOCKS // 4)]
    prompts = [shared + [draw.getrandbits(62) for _ in range(_BLOCKS - len(shared))] for _ in range(64)]
    made = []
    for number, chain in enumerate(prompts):
        tokens = _BLOCK * _BLOCKS
        request = SchedulingRequest(
            id=str(number), model="m", prompt_tokens=tokens, block_size=_BLOCK, chain=chain, prefix=b""
        )
        decision = Decision(
            request=request, candidates=candidates, ranked=candidates, filtered={}, scores={}, totals={}, timings_ms={}
        )
        kept = record(decision, CHAT_PATH, [], {})
        kept.answered(200)
        kept.first_byte(0.1)
        kept.usage(tokens, tokens // 2)
        made.append((decision, kept))
        log.add(kept)
        history.decided(kept, decision)
        history.ended(kept)
    return made


def _page_of(pods: int) -> Callable[[], None]:
    """Makes the event of one second for one page, in which every endpoint and every decision has changed."""
    names = [f"pod-{at}" for at in range(pods)]
    registry, load = registry_of(names), LoadLedger(time.monotonic, 30.0)
    seconds = iter(range(1 << 62))

    def clock() -> float:
        return float(moment)

    moment = next(seconds)
    history, log = History(clock), DecisionLog(1_000)
    made = _fill(history, log)
    fleet = Fleet(registry, FeedCaches({}), Outliers(OutliersConfig(), clock), load, history)
    about = About(version="", api="", decisions_kept=1_000)
    live = Live(fleet, history, log, lambda: about, clock, clock)
    version, encoder = live.view().version, msgspec.json.Encoder()

    def tell() -> None:
        nonlocal moment, version
        moment = next(seconds)
        for name in names:
            metrics = EngineMetrics(running=moment, waiting=0, cache_usage=0.5, read_at=registry.clock())
            registry.measured(name, metrics)
        for _, kept in made:
            kept.at = moment
            log.add(kept)
        view = live.view(version)
        version = view.version
        encoder.encode(view)

    return tell


async def _rounds(api: str, admin: str, pid: int, scale: Scale) -> tuple[list[float], list[float]]:
    """Share of a core that the process takes in each round: without a page, and with one. They take turns to be first."""
    pairs, seconds = (6, 1.0) if scale.proxy_rounds > 1 else (1, 0.2)
    closed: list[float] = []
    opened: list[float] = []
    bodies = [chat(2, session) for session in range(scale.sessions)]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await _send(session, api, bodies, seconds / 4)
        for number in range(pairs):
            for is_open in (number % 2 == 1, number % 2 == 0):
                async with _page(session, admin) if is_open else nullcontext():
                    (opened if is_open else closed).append(await _cpu(session, api, bodies, pid, seconds))
    return closed, opened


async def _cpu(session: aiohttp.ClientSession, api: str, bodies: list[bytes], pid: int, seconds: float) -> float:
    before = cpu_seconds(pid)
    await _send(session, api, bodies, seconds)
    return (cpu_seconds(pid) - before) / seconds


async def _send(session: aiohttp.ClientSession, api: str, bodies: list[bytes], seconds: float) -> None:
    """Requests at a steady rate, whatever the answers take."""

    async def one(body: bytes) -> None:
        headers = {"content-type": "application/json"}
        async with session.post(api + CHAT_PATH, data=body, headers=headers, raise_for_status=True) as response:
            await response.read()

    clock = asyncio.get_running_loop().time
    began = clock()
    async with asyncio.TaskGroup() as group:
        for number in range(int(seconds * _PER_SECOND)):
            await asyncio.sleep(began + number / _PER_SECOND - clock())
            group.create_task(one(bodies[number % len(bodies)]))


@asynccontextmanager
async def _page(session: aiohttp.ClientSession, admin: str) -> AsyncIterator[None]:
    """A page that takes what it is sent."""
    async with session.get(f"{admin}/debug/dashboard/events", raise_for_status=True) as response:
        await response.content.readline()

        async def read() -> None:
            async for _ in response.content.iter_any():
                pass

        task = asyncio.create_task(read())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])


@contextmanager
def _process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of `bench.servers`, until the context ends."""
    command = [sys.executable, "-m", "bench.servers", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process  # leaving closes its standard input, which ends it


def _line(process: subprocess.Popen[str]) -> list[str]:
    """The URLs that a server prints when it is ready."""
    assert process.stdout is not None
    urls = process.stdout.readline().split()
    if not urls:
        raise RuntimeError(f"expected the URLs of {process.args!r}, but it did not start")
    return urls
