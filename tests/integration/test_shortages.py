"""A process without free descriptors says so, and blames no engine."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
from aiohttp import web
from multidict import CIMultiDict
from redis.exceptions import ConnectionError as RedisConnectionError

from matrixinfer.config import LimitsConfig, PodConfig, PodWatchConfig
from matrixinfer.errors import IndexUnavailable, Overloaded, TokenizeError
from matrixinfer.gateway.upstream import upstream
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.index.redis.store import unavailable
from matrixinfer.kvevents.subscriber import Subscriber
from matrixinfer.pods.engine_api import EngineApi, OutOfResources
from matrixinfer.pods.registry import PodRegistry
from matrixinfer.pods.session import client_session
from matrixinfer.pods.watcher import PodWatcher
from matrixinfer.prompt.remote import RemoteTokenizer
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.telemetry.shortages import Shortages
from tests.integration.gateway_support import pod
from tests.integration.kvevents_support import BLOCKS, complete, stored
from tests.integration.kvevents_support import Engine as Publisher
from tests.integration.test_gateway_watcher import Engine
from tests.integration.test_remote_tokenizer import Engine as Asked
from tests.integration.test_remote_tokenizer import text
from tests.waiting import DEADLINE_SECONDS, eventually

WATCH = PodWatchConfig(
    scrape_interval_seconds=0.02, scrape_timeout_seconds=DEADLINE_SECONDS, unhealthy_after_failures=1
)


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Within the context this process cannot open anything."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    filler: list[int] = []
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (max(int(each.name) for each in Path("/proc/self/fd").iterdir()) + 1, before[1])
    )
    try:
        with suppress(OSError):
            while True:
                filler.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for descriptor in filler:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def counted(metrics: Metrics, place: str) -> float:
    return metrics.registry.get_sample_value("matrixinfer_shortages_total", {"place": place}) or 0.0


class Unkept(Engine):
    """Every question takes a new connection."""

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        response = await super().__call__(request)
        response.force_close()
        return response


async def test_a_watched_pod_stays_healthy_and_is_asked_again_afterwards() -> None:
    engine, metrics = Unkept(), Metrics()
    async with pod(engine) as url, client_session() as session:
        registry = PodRegistry([PodConfig(name="a", url=url)], (), WATCH, clock=time.monotonic)
        shortages = Shortages(metrics, time.monotonic)
        with structlog.testing.capture_logs() as logs:
            async with PodWatcher(registry, session, WATCH, on_shortage=shortages) as watcher:
                assert await watcher.first_round(DEADLINE_SECONDS)
                with no_descriptors():
                    await eventually(lambda: counted(metrics, "watcher") >= 3)
                    assert (registry.pods[0].healthy, registry.pods[0].failures) == (True, 0)
                asked = len(engine.asked)
                await eventually(lambda: len(engine.asked) > asked + 10)
                assert "/v1/models" in engine.asked[asked:]  # it may be another engine by now
    events = [entry["event"] for entry in logs]
    assert events.count("resources_ran_out") == 1
    assert "pod_went_down" not in events
    assert "pod_watch_failed" not in events
    assert "no free file descriptor" in next(entry["reason"] for entry in logs if entry["event"] == "resources_ran_out")


async def test_a_request_is_refused_as_too_much_and_counted() -> None:
    metrics = Metrics()
    shortages = Shortages(metrics, time.monotonic)
    async with pod(Engine()) as url:
        with upstream(LimitsConfig(), metrics, shortages) as connections, no_descriptors(), pytest.raises(Overloaded):
            await connections.send("POST", url, "/v1/completions", b"{}", CIMultiDict())
    assert counted(metrics, "requests") == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_feed_is_followed_once_there_are_descriptors_again(host: str) -> None:
    metrics = Metrics()
    shortages = Shortages(metrics, time.monotonic)
    async with Publisher() as publisher:
        publisher.publish(stored(0, 2))
        source = publisher.source()
        source = replace(source, endpoint=source.endpoint.replace("127.0.0.1", host))
        with structlog.testing.capture_logs() as logs:
            async with Subscriber(index=MemoryIndex(), blocks=BLOCKS, on_shortage=shortages) as subscriber:
                with no_descriptors():
                    feed = subscriber.follow(source)
                    await eventually(lambda: counted(metrics, "events") >= 1)
                await eventually(lambda: complete(feed))
    events = [entry["event"] for entry in logs]
    assert events.count("resources_ran_out") == 1
    assert not {"kv_events_failed", "kv_events_unresolved"} & set(events)


async def test_an_engine_is_not_left_alone_because_it_could_not_be_asked() -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"tokens": [1, 2]})

    async with pod(answer) as url, client_session() as session:
        remote, engines = RemoteTokenizer(session), [Asked(url=url)]
        with no_descriptors(), pytest.raises(TokenizeError, match="no free file descriptor"):
            await remote.tokenize(text("x"), engines, "tiny", timeout_seconds=DEADLINE_SECONDS)
        ids = await remote.tokenize(text("x"), engines, "tiny", timeout_seconds=DEADLINE_SECONDS)
        assert list(ids) == [1, 2]


async def test_whoever_asks_an_engine_is_told_whose_fault_it_is() -> None:
    async with client_session() as session:
        with no_descriptors(), pytest.raises(OutOfResources, match="this process has no free file descriptor"):
            await EngineApi(session, DEADLINE_SECONDS).check("http://127.0.0.1:9")


def test_redis_is_not_said_to_be_unreachable() -> None:
    error = RedisConnectionError("Error 24 connecting to x:6379.")
    error.__cause__ = OSError(errno.EMFILE, "Too many open files")
    with pytest.raises(IndexUnavailable, match="this process has no free file descriptor"), unavailable():
        raise error


def test_the_first_publisher_may_come_when_there_are_no_descriptors() -> None:
    """ZMQ starts its threads with the first socket, and would end the process."""
    script = """
import zmq
from matrixinfer.kvevents.connect import open_context
from tests.integration.test_shortages import no_descriptors
context = open_context(16)
with no_descriptors():
    try:
        context.socket(zmq.SUB)
    except zmq.ZMQError as error:
        print(error.errno)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, str(errno.EMFILE))
