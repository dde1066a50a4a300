"""Whenever and however a request ends, the gateway keeps nothing of it: no charge, no watch, no request in flight."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from matrixinfer.app.service import Service
from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config import (
    BlocksConfig,
    Config,
    LimitsConfig,
    ModelConfig,
    PodConfig,
    SchedulerConfig,
    TokenizationConfig,
)
from matrixinfer.kvevents.feed import FeedState, PodFeed
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.scheduler.policies import with_policy
from matrixinfer.sim.events import BlockStored, EventBatch, encode
from tests.integration.gateway_support import LOOPBACK, raw_pod, read_request
from tests.waiting import eventually

TOKENS = list(range(64))
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = b"6\r\nhello!\r\n"
MODELS = json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]}).encode()


class Pod:
    """Serves the model `m`, and leaves a request for it where `stops_after` says."""

    def __init__(self, stops_after: bytes | None) -> None:
        self._stops_after = stops_after
        self.reached = asyncio.Event()
        """A request has come as far as the pod lets it."""
        self.go_on = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await read_request(reader)
        except asyncio.IncompleteReadError:
            return  # a connection that was opened and not used
        if head.startswith(b"GET /v1/models"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(MODELS), MODELS))
            await writer.drain()
        elif not head.startswith(b"POST"):
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
        elif self._stops_after is not None:
            writer.write(self._stops_after)
            await writer.drain()
            self.reached.set()
            await self.go_on.wait()


class Gateway:
    """A real gateway whose pods `a` and `b` have exact feeds and hold half of the prompt."""

    def __init__(self, service: Service) -> None:
        self.service = service
        engines = service.engines
        for pod in engines.registry.pods:
            ledger = Ledger(pod=pod.name, model="m", blocks=TokenBlockProcessor(8), index=engines.setup.index)
            feed = engines.subscriber.feeds[pod.name] = PodFeed(ledger, can_replay=False)
            stored = BlockStored(
                block_hashes=[1, 2], parent_block_hash=None, token_ids=TOKENS[:32], block_size=16, extra_keys=None
            )
            feed.live(0, encode(EventBatch(ts=0.0, events=[stored])))
            assert feed.state is FeedState.COMPLETE
        self.feeds = list(engines.subscriber.feeds.values())

    async def send(self, **fields: object) -> asyncio.StreamWriter:
        _, port = self.service.gateway.url.rsplit(":", 1)
        _, writer = await asyncio.open_connection(LOOPBACK, int(port))
        body = json.dumps({"model": "m", "prompt": TOKENS, "stream": True, **fields}).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        return writer

    def watches(self) -> int:
        return sum(feed.ledger.supports.watched for feed in self.feeds)

    def in_flight(self) -> float:
        exposed = self.service.metrics.render().decode().splitlines()
        return sum(float(line.split()[-1]) for line in exposed if line.startswith("matrixinfer_in_flight{"))

    def charged(self) -> int:
        return self.service.state.load.total()

    async def is_clean(self) -> None:
        """Nothing is left, and nothing is left of it twice."""
        await eventually(lambda: (self.charged(), self.watches(), self.in_flight()) == (0, 0, 0.0))
        load = self.service.state.load
        assert (load.loads(), load.queued_tokens("a"), load.queued_tokens("b")) == ({}, 0, 0)


@asynccontextmanager
async def gateway(*urls: str, policy: str = "kv_aware") -> AsyncIterator[Gateway]:
    config = Config(
        listen=f"{LOOPBACK}:0",
        admin=None,
        models=(ModelConfig(name="m"),),
        pods=tuple(PodConfig(name=name, url=url, kv_events="none") for name, url in zip("ab", urls, strict=False)),
        blocks=BlocksConfig(size=8),
        limits=LimitsConfig(request_timeout_seconds=5.0),
        tokenization=TokenizationConfig(timeout_seconds=5.0, wait_milliseconds=5000.0),
        scheduler=with_policy(SchedulerConfig(), policy),
    )
    async with Service(config) as service:
        yield Gateway(service)


STAGES = {"before the headers": b"", "before the first byte": HEAD, "within the stream": HEAD + CHUNK}


async def arrived(front: Gateway, pod: Pod) -> None:
    """Wait until a request is as far as it gets."""
    await pod.reached.wait()
    await eventually(lambda: (front.charged(), front.in_flight()) == (1, 1.0))


@pytest.mark.parametrize("stage", STAGES)
async def test_a_client_that_goes_away_leaves_nothing(stage: str) -> None:
    pod = Pod(STAGES[stage])
    async with asyncio.timeout(20), raw_pod(pod) as url, gateway(url) as front:
        client = await front.send()
        await arrived(front, pod)
        client.transport.abort()
        await front.is_clean()


@pytest.mark.parametrize("stage", STAGES)
async def test_a_pod_that_goes_away_leaves_nothing(stage: str) -> None:
    pod = Pod(STAGES[stage])
    async with asyncio.timeout(20), raw_pod(pod) as url, gateway(url) as front:
        client = await front.send()
        await arrived(front, pod)
        pod.go_on.set()
        await front.is_clean()
        client.transport.abort()


async def test_a_client_that_goes_away_while_its_prompt_is_tokenized_was_never_charged() -> None:
    pod = Pod(b"")
    async with asyncio.timeout(20), raw_pod(pod) as url, gateway(url) as front:
        client = await front.send(prompt="a text that only the engine can tokenize")
        await pod.reached.wait()
        assert front.charged() == 0
        client.transport.abort()
        await front.is_clean()
        assert not len(front.service.state.decisions)


@pytest.mark.parametrize("stage", STAGES)
async def test_a_request_that_was_moved_leaves_nothing_at_either_pod(stage: str) -> None:
    pod = Pod(STAGES[stage])
    async with (
        asyncio.timeout(20),
        raw_pod(pod) as url,
        raw_pod(Pod(None)) as closing,
        gateway(url, closing, policy="round_robin") as front,
    ):
        for _ in range(4):  # to one pod first, or to the other
            front.service.engines.registry.answered("b")
            client = await front.send()
            await arrived(front, pod)
            client.transport.abort()
            await front.is_clean()
            pod.reached.clear()
        assert {len(each.attempts) for each in front.service.state.decisions.newest()} == {1, 2}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("first", ["client", "pod"])
async def test_a_pod_that_leaves_with_a_request_in_flight_is_forgotten(stage: str, first: str) -> None:
    pod = Pod(STAGES[stage])
    async with asyncio.timeout(20), raw_pod(pod) as url, gateway(url) as front:
        client = await front.send()
        await arrived(front, pod)
        if first == "client":
            client.transport.abort()
        else:
            pod.go_on.set()
        front.service.leave("a")
        del front.service.engines.subscriber.feeds["a"]  # which nobody follows, as it was made by hand
        client.transport.abort()
        pod.go_on.set()
        await front.is_clean()
        assert b'pod="a"' not in front.service.metrics.render()
        assert not len(front.service.engines.drift)


async def test_a_gateway_that_stops_cancels_what_is_in_flight_and_leaves_nothing() -> None:
    pod = Pod(HEAD + CHUNK)
    async with asyncio.timeout(20), raw_pod(pod) as url:
        async with gateway(url) as front:
            client = await front.send()
            await arrived(front, pod)
        client.close()
        await front.is_clean()
