"""What each of several workers gets of the gateway's limits, and how it learns what it is."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from matrixinfer.app.workers.supervisor import share_of
from matrixinfer.app.workers.worker import VARIABLE, Folder, Worker, from_environment, passed_on
from matrixinfer.config import parse
from matrixinfer.errors import ConfigError

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
    assert from_environment({VARIABLE: passed_on(worker)}) == worker
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
