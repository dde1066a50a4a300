"""What each of several workers gets of the gateway's limits, and how it learns what it is."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from aiohttp import StreamReader, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.test_utils import make_mocked_request

from matrixinfer.app.workers.front import AdminFront
from matrixinfer.app.workers.share import share_of
from matrixinfer.app.workers.worker import VARIABLE, Folder, Worker, from_environment, to_environment
from matrixinfer.config import LimitsConfig, parse
from matrixinfer.errors import ConfigError, PayloadTooLarge
from matrixinfer.gateway.body import Bodies
from matrixinfer.prompt.memory import Memory
from matrixinfer.telemetry.intervals import Intervals

TEXT = """
workers: 3
limits: {memoryBytes: 300000000}
connections: {max: 10}
retries: {budgetPerSecond: 9}
accessLog: {path: /var/log/access.jsonl}
admission: {maxConcurrentRequests: 7, queueSize: 9}
redis: {password: hush}
"""


def test_workers_keep_the_limits_of_the_gateway_together() -> None:
    share = share_of(parse(TEXT, base=Path()))
    assert share.limits.memory_bytes == 100_000_000
    assert share.connections.max == 4
    assert share.retries.budget_per_second == 3
    assert share.admission is not None
    assert (share.admission.max_concurrent_requests, share.admission.queue_size) == (3, 3)


def test_a_worker_starts_with_what_its_supervisor_has_written(tmp_path: Path) -> None:
    folder = Folder(path=tmp_path)
    config = share_of(parse(TEXT, base=Path()))
    folder.config.write_bytes(msgspec.json.encode(config))
    worker = Worker(number=2, listens=(5, 6, 7), alive=8, folder=folder)
    assert from_environment({VARIABLE: to_environment(worker)}) == worker
    assert from_environment({}) is None
    read = worker.configuration()
    assert read.access_log is not None
    assert read.access_log.path == "/var/log/access-2.jsonl"
    assert msgspec.structs.replace(read, access_log=config.access_log) == config


def test_local_limits_would_be_multiplied() -> None:
    access = "access: {keysFile: keys.yaml, limits: {requests: 5}}"
    with pytest.raises(ConfigError, match=r"\$\.access\.countIn: expected `redis`"):
        parse(f"workers: 2\n{access}", base=Path())
    parse(f"workers: 1\n{access}", base=Path())


async def test_a_body_that_is_too_large_is_the_clients_fault() -> None:
    admin = front_of(LimitsConfig(max_body_bytes=10))
    body = StreamReader(BaseProtocol(asyncio.get_running_loop()), limit=64)
    body.feed_data(b"x" * 11)
    body.feed_eof()
    with pytest.raises(PayloadTooLarge):
        await admin.ask_all(make_mocked_request("POST", "/admin/pods", payload=body))


def front_of(limits: LimitsConfig) -> AdminFront:
    bodies = Bodies(limits, Memory(limits.memory_bytes), Intervals(1.0, lambda: 0.0))
    return AdminFront([], asyncio.Event(), bodies, lambda: b"", never)


async def never() -> web.StreamResponse:
    raise AssertionError("nobody reloads")
