"""How much more a gateway serves with two workers than with one, where the cores are left to them.

Engine and client count bytes and do nothing else (`bench.tiny`). Beside one worker they have the other core, and the
worker's is busy all the time. Two workers have both cores, and share them with engine and client. What two workers serve
on cores of their own follows from the CPU time that a request takes there.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median

import uvloop
from yarl import URL

from bench.measure import Figure, Scale, ratio
from bench.peers.routers import Router, gateway, running
from bench.prompts import chat
from bench.proxy import server_process
from bench.tiny import drive, request
from matrixinfer.prompt.openai import CHAT_PATH

_CONNECTIONS = 128
"""So many that the kernel deals them out about evenly."""
_KIB = 2
_TARGET = 1 / 1.8


def run(scale: Scale) -> Iterator[Figure | str]:
    """Requests per second and CPU time per request, with one worker and with two."""
    rounds, seconds = (6, 1.5) if scale.proxy_rounds > 1 else (1, 0.2)
    took: dict[int, list[float]] = {1: [], 2: []}
    spent: dict[int, list[float]] = {1: [], 2: []}
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine = stack.enter_context(server_process("tiny"))
        assert engine.stdout is not None
        url = engine.stdout.readline().strip()
        routers = {
            count: stack.enter_context(running(f"workers-{count}", folder, [url], partial(_gateway, count)))
            for count in took
        }
        stack.callback(os.sched_setaffinity, 0, cores)
        for number in range(rounds):
            for count, router in routers.items():
                yield f"{count} workers, round {number + 1} of {rounds}"
                _place(router.family(), cores[: 1 if count == 1 else 2])
                _place([engine.pid, os.getpid()], cores[1:2] if count == 1 else cores[:2])
                seconds_each, cpu_each = _round(router, seconds, scale)
                took[count].append(seconds_each)
                spent[count].append(cpu_each)
    for count, times in took.items():
        case = f"{count} worker{'s' * (count > 1)}"
        yield Figure(case=case, name="served", value=1 / median(times), unit="requests/s")
        yield Figure(case=case, name="CPU", value=median(spent[count]) * 1e6, unit="µs")
    shared, alone = ratio(took[2], took[1]), ratio(spent[2], spent[1]) / 2
    yield Figure(case="2 workers of 1", name="time, cores shared", value=shared, unit="×")
    yield Figure(case="2 workers of 1", name="time, cores of their own", value=alone, unit="×", target=_TARGET)


def _gateway(workers: int, folder: Path, port: int, engines: Sequence[str]) -> list[str]:
    return [*gateway(folder, port, engines), "--workers", str(workers)]


def _place(pids: Sequence[int], cores: Sequence[int]) -> None:
    """Keep all threads of the processes on these cores."""
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), cores)


def _round(router: Router, seconds: float, scale: Scale) -> tuple[float, float]:
    """Seconds, and seconds of CPU time, per request."""
    url = URL(router.url)
    requests = [request(url.authority, CHAT_PATH, chat(_KIB, session)) for session in range(scale.sessions)]
    before, began = router.cpu_seconds(), time.perf_counter()
    sending = drive(url.host or "", url.port or 0, requests, connections=_CONNECTIONS, seconds=seconds)
    answered = uvloop.run(sending)
    return (time.perf_counter() - began) / answered, (router.cpu_seconds() - before) / answered
