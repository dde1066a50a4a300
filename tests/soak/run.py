"""Runs a soak: rounds of load and faults, each followed by a rest at which every gateway is measured."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path

import aiohttp

from matrixinfer.tasks import cancel_and_wait
from tests.soak.clients import Client, Tally
from tests.soak.fleet import Fleet, Gateway, descriptors, fleet, resident_bytes
from tests.soak.report import ANSWERED_SHARE, MORE_TASKS, Result, Sample

WATCH_SECONDS = 2.0
REST_SECONDS = 30.0
"""How long a gateway may take to be at rest; what is still there then stays."""
FAULTS_OF_OURS = re.compile(r"_(failed|crashed)$")
_READ = r'^matrixinfer_(in_flight|loop_pause_seconds\{kind="(?:elapsed|cpu)"\}|loop_tasks)\S* (\S+)$'
EXPECTED = frozenset({"redis_writes_failed", "redis_states_read_failed", "kv_events_replay_failed", "load_feed_failed"})
"""Events that only report what was inflicted."""


async def soak(
    folder: Path,
    *,
    seconds: float,
    clients: int,
    rounds: int,
    redis: bool,
    seed: int = 0,
    least_answered: float = ANSWERED_SHARE,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Result, Tally]:
    """Run it all. The first round only warms up, and is half as long."""
    result = Result(
        seconds=seconds, clients=clients, index="redis" if redis else "memory", least_answered=least_answered
    )
    tally, numbers = Tally(), count()
    progress("starting engines and gateways")
    async with fleet(folder, redis=redis, seed=seed) as there:
        result.longest_pauses = [{"elapsed": 0.0, "cpu": 0.0} for _ in there.gateways]
        watch = asyncio.create_task(_watch(there, result, tally, progress))
        length = seconds / (rounds + 0.5)
        for number in range(rounds + 1):
            async with _load(there, clients, tally, numbers, seed + number):
                await asyncio.sleep(length if number else length / 2)
            await there.heal()
            result.rounds.append(
                [await _at_rest(there, gateway, result, n) for n, gateway in enumerate(there.gateways)]
            )
            progress(f"round {number} of {rounds}: {_shown(result.rounds[-1])}")
        await cancel_and_wait(watch)
        result.faults = dict(there.struck)
        result.dead = [n for n, gateway in enumerate(there.gateways) if gateway.process.poll() is not None]
        result.logged = dict(_faults([gateway.log for gateway in there.gateways]))
    return result, tally


def _shown(samples: list[Sample]) -> str:
    return "; ".join(
        f"{it.memory_bytes / 1e6:.1f} MB, {it.descriptors} descriptors, {it.tasks} tasks, {it.in_flight} in flight"
        for it in samples
    )


@asynccontextmanager
async def _load(there: Fleet, clients: int, tally: Tally, numbers: count[int], seed: int) -> AsyncIterator[None]:
    """Clients and faults while the context is open; at its end every client waits for its last answer."""
    over = asyncio.Event()
    urls = [gateway.url for gateway in there.gateways]
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3)
    session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
    async with session, asyncio.TaskGroup() as group:
        chaos = group.create_task(there.chaos())
        for number in range(clients):
            group.create_task(Client(urls, session, tally, numbers, 1000 * seed + number).run(over))
        yield
        over.set()
        await cancel_and_wait(chaos)


async def _watch(there: Fleet, result: Result, tally: Tally, progress: Callable[[str], None]) -> None:
    """Ask the gateways how they are, all the time; say now and then how it goes."""
    began, said, shown = time.monotonic(), 0.0, 0
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        for number, gateway in enumerate(there.gateways):
            asked = time.monotonic()
            with suppress(aiohttp.ClientError, TimeoutError):
                async with there.session.get(f"{gateway.url}/health") as response:
                    await response.read()
            result.health_seconds = max(result.health_seconds, time.monotonic() - asked)
            await _metrics(there, gateway, result, number)
        elapsed = time.monotonic() - began
        for wrong in tally.wrong[shown:]:
            progress(f"{elapsed:4.0f} s  WRONG: {wrong}")
        shown = len(tally.wrong)
        if elapsed - said >= 5 * WATCH_SECONDS:
            said = elapsed
            pids = [gateway.process.pid for gateway in there.gateways]
            memory = sum(map(resident_bytes, pids)) / 1e6
            progress(
                f"{elapsed:4.0f} s  {tally.sent:,} requests, {tally.answered_share:.1%} answered, "
                f"{len(tally.wrong)} wrong  {memory:.0f} MB, {sum(map(descriptors, pids))} descriptors, "
                f"pause {1000 * max(each['elapsed'] for each in result.longest_pauses):.0f} ms  {there.ailing or ''}"
            )


async def _metrics(there: Fleet, gateway: Gateway, result: Result, number: int) -> dict[str, float]:
    """Some of a gateway's metrics, each summed over its labels."""
    found: defaultdict[str, float] = defaultdict(float)
    with suppress(aiohttp.ClientError, TimeoutError):
        async with there.session.get(f"{gateway.admin}/metrics") as response:
            text = await response.text()
        for name, value in re.findall(_READ, text, flags=re.MULTILINE):
            found[name] += float(value)
        for kind, longest in result.longest_pauses[number].items():
            result.longest_pauses[number][kind] = max(longest, found[f'loop_pause_seconds{{kind="{kind}"}}'])
    return found


async def _at_rest(there: Fleet, gateway: Gateway, result: Result, number: int) -> Sample:
    """Wait until nothing is left of the requests, at most for `REST_SECONDS`, and measure."""
    ends = time.monotonic() + REST_SECONDS
    before = result.rounds[0][number] if result.rounds else None
    await asyncio.sleep(6.0)  # kept connections end
    while True:
        seen = await _metrics(there, gateway, result, number)
        sample = Sample(
            memory_bytes=resident_bytes(gateway.process.pid),
            descriptors=descriptors(gateway.process.pid),
            tasks=int(seen.get("loop_tasks", 0)),
            in_flight=int(seen.get("in_flight", 0)),
        )
        if time.monotonic() > ends or (sample.in_flight == 0 and _is_back(sample, before, result.more_descriptors)):
            return sample
        await asyncio.sleep(0.5)


def _is_back(sample: Sample, before: Sample | None, more_descriptors: int) -> bool:
    return before is None or (
        sample.tasks <= before.tasks + MORE_TASKS and sample.descriptors <= before.descriptors + more_descriptors
    )


def _faults(logs: list[Path]) -> Counter[str]:
    """Log events that report a fault of the gateway."""
    found: Counter[str] = Counter()
    for log in logs:
        for line in log.read_text().splitlines():
            try:
                event = str(json.loads(line)["event"])
            except (ValueError, KeyError, TypeError):
                event = f"a line that is no event: {line[:80]}"
                found[event] += 1
                continue
            if FAULTS_OF_OURS.search(event) and event not in EXPECTED:
                found[event] += 1
    return found
