"""Published load over real ZMQ sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import msgspec
import pytest
import structlog
import zmq

from matrixinfer.config import PodConfig, PodWatchConfig
from matrixinfer.kvevents import connect, load_follower
from matrixinfer.kvevents.load_follower import LoadFollower
from matrixinfer.pods.engine_kind import EngineFacts
from matrixinfer.pods.publishers import KvSource
from matrixinfer.pods.registry import Pod, PodRegistry
from tests.waiting import eventually


class Publisher:
    """A rank that publishes what it is told to."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._pub = context.socket(zmq.PUB)
        self.endpoint = f"tcp://127.0.0.1:{self._pub.bind_to_random_port('tcp://127.0.0.1')}"

    def send(self, *parts: bytes) -> None:
        self._pub.send_multipart(list(parts))

    def report(self, running: int, rank: int | None = None) -> None:
        self.send(b"load", bytes(8), msgspec.msgpack.encode(["LoadStat", running, 0, 5, 10, rank]))


@pytest.fixture
def publishers() -> Iterator[list[Publisher]]:
    context = zmq.Context()
    yield [Publisher(context), Publisher(context)]
    context.destroy(linger=0)


@pytest.fixture
def registry() -> PodRegistry:
    return PodRegistry([PodConfig(name="a", url="http://a")], (), PodWatchConfig(), clock=time.monotonic)


@pytest.fixture
async def follower(registry: PodRegistry) -> AsyncIterator[LoadFollower]:
    async with LoadFollower(registry) as follower:
        yield follower


def described(registry: PodRegistry, *publishers: Publisher) -> Pod:
    sources = (
        KvSource(endpoint="tcp://h:1", rank=rank, load_endpoint=each.endpoint) for rank, each in enumerate(publishers)
    )
    registry.learn("a", kv_sources=tuple(sources))
    return registry.pods[0]


async def hears(pod: Pod, endpoint: str, publisher: Publisher, running: int) -> None:
    """Publish until it is heard: the first messages may come before the connection."""

    def heard() -> bool:
        publisher.report(running)
        return endpoint in pod.loads and pod.loads[endpoint].running == running

    await eventually(heard, pause=0.02)


async def test_the_load_of_every_rank_is_known_as_it_is_published(
    registry: PodRegistry, follower: LoadFollower, publishers: list[Publisher]
) -> None:
    pod = described(registry, *publishers)
    with structlog.testing.capture_logs() as logs:
        follower.follow(pod)
        follower.follow(pod)
        await hears(pod, "a@dp0", publishers[0], 3)
        await hears(pod, "a@dp1", publishers[1], 7)
    assert pod.loads["a@dp0"].running == 3
    assert sorted(line["pod"] for line in logs if line["event"] == "load_feed_followed") == ["a@dp0", "a@dp1"]
    follower.leave("a")
    assert follower.stats == {}


async def test_what_is_no_report_or_of_another_rank_changes_nothing(
    registry: PodRegistry, follower: LoadFollower, publishers: list[Publisher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_follower, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(connect, "MAX_MESSAGE_BYTES", 200_000)
    pod = described(registry, *publishers)
    follower.follow(pod)
    await hears(pod, "a@dp0", publishers[0], 3)
    with structlog.testing.capture_logs() as logs:
        publishers[0].report(9, rank=1)
        publishers[0].send(b"load", bytes(8), b"\xc1")
        publishers[0].send(b"load", bytes(8))
        publishers[0].send(b"load", bytes(8), b"x" * 100_000)
        await eventually(lambda: follower.stats["a@dp0"]["malformed"] == 3)
    assert pod.loads["a@dp0"].running == 3
    assert follower.stats["a@dp0"]["misdirected"] == 1
    assert [line["reason"] for line in logs if line["event"] == "load_feed_ignored"] == ["misdirected", "malformed"]
    publishers[0].send(b"load", bytes(8), b"x" * 300_000)  # ZMQ drops the connection, and makes no new one
    await asyncio.sleep(0.1)
    await hears(pod, "a@dp0", publishers[0], 4)


async def test_a_publisher_that_moved_is_followed_to_where_it_is(
    registry: PodRegistry, follower: LoadFollower, publishers: list[Publisher]
) -> None:
    pod = described(registry, publishers[0])
    follower.follow(pod)
    await hears(pod, "a", publishers[0], 3)
    follower.follow(described(registry, publishers[1]))
    await hears(pod, "a", publishers[1], 5)
    follower.follow(described(registry))
    assert follower.stats == {}


async def test_one_rank_does_not_speak_for_an_engine_with_several(
    registry: PodRegistry, follower: LoadFollower, publishers: list[Publisher]
) -> None:
    pod = described(registry, publishers[0])
    registry.learn("a", facts=EngineFacts(kind="sglang", ranks=2))
    follower.follow(pod)
    assert follower.stats == {}
