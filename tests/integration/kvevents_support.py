"""Engines that publish over real sockets, and what stands between them and a subscriber."""

from __future__ import annotations

import asyncio
from typing import Self

import zmq
import zmq.asyncio

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.feed import FeedState, PodFeed
from matrixinfer.kvevents.subscriber import FeedSource
from matrixinfer.sim.events import BlockStored, Event, EventBatch, encode
from matrixinfer.sim.publisher import EventPublisher

TOKENS = list(range(64))
BLOCKS = TokenBlockProcessor(16)
END = 2**64 - 1


def stored(first: int, last: int) -> BlockStored:
    """Blocks [first, last) of TOKENS, 16 tokens each, named by their position."""
    return BlockStored(
        block_hashes=[100 + i for i in range(first, last)],
        parent_block_hash=99 + first if first else None,
        token_ids=TOKENS[first * 16 : last * 16],
        block_size=16,
        lora_id=None,
        medium="GPU",
        lora_name=None,
        extra_keys=[None] * (last - first),
        group_idx=0,
        kv_cache_spec_kind="full_attention",
    )


class LossyPublisher(EventPublisher):
    """A publisher that leaves chosen batches out of its next replays."""

    def __init__(self, host: str, *, port: int, replay_port: int, topic: str) -> None:
        super().__init__(host, port=port, replay_port=replay_port, topic=topic)
        self.asked: list[int] = []
        self._losses: list[set[int]] = []
        self._lost: set[int] = set()

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        send = self._router.send_multipart

        async def lossy_send(parts: list[bytes]) -> None:
            if int.from_bytes(parts[-2], "big") not in self._lost:
                await send(parts)

        setattr(self._router, "send_multipart", lossy_send)  # noqa: B010 - mypy minds assigned methods
        return self

    def lose_in_replays(self, losses: list[set[int]]) -> list[int]:
        """Leave these numbers out of the next answers, one set each; returns the growing list of numbers asked for."""
        self._losses, self.asked = losses, []
        return self.asked

    async def _replay(self, peer: bytes, start: int) -> None:
        self.asked.append(start)
        position = len(self.asked) - 1
        self._lost = self._losses[position] if position < len(self._losses) else set()
        await super()._replay(peer, start)


class Engine:
    """A publisher with its replay task."""

    def __init__(self, ports: tuple[int, int] = (0, 0), topic: str = "", pod: str = "a") -> None:
        self.publisher = LossyPublisher("127.0.0.1", port=ports[0], replay_port=ports[1], topic=topic)
        self.pod = pod

    async def __aenter__(self) -> Engine:
        await self.publisher.__aenter__()
        self._task = asyncio.create_task(self.publisher.serve())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        await self.publisher.__aexit__(None, None, None)

    def publish(self, *events: Event) -> None:
        self.publisher.publish(encode(EventBatch(0.0, list(events))))

    def source(self, *, replay: bool = True, topic: str | None = None) -> FeedSource:
        return FeedSource(
            pod=self.pod,
            model="m",
            endpoint=self.publisher.endpoint,
            replay_endpoint=self.publisher.replay_endpoint if replay else None,
            topic=topic,
        )

    def lose_in_replays(self, losses: list[set[int]]) -> list[int]:
        """Leave these numbers out of the next answers, one set each; returns the growing list of numbers asked for."""
        return self.publisher.lose_in_replays(losses)


class Answers:
    """Answers every request for a replay with the same messages."""

    def __init__(self, messages: list[list[bytes]]) -> None:
        self._messages = messages

    async def __aenter__(self) -> Answers:
        self._context = zmq.asyncio.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.bind("tcp://127.0.0.1:0")
        self.endpoint = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._task = asyncio.create_task(self._answer())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        self._context.destroy(linger=0)

    async def _answer(self) -> None:
        while True:
            peer, *_ = await self._router.recv_multipart()
            for message in self._messages:
                await self._router.send_multipart([peer, *message])


class Relay:
    """A TCP relay whose present connections can go silent without being closed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        self.endpoint = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.go_silent()
        for writer in self._writers:
            writer.close()

    def cut(self) -> None:
        """Close the present connections."""
        for writer in self._writers:
            writer.close()

    def go_silent(self) -> None:
        while self._tasks:
            self._tasks.pop().cancel()

    async def _join(self, near: asyncio.StreamReader, to_near: asyncio.StreamWriter) -> None:
        far, to_far = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [to_near, to_far]
        self._tasks += [asyncio.create_task(self._pass(*pair)) for pair in ((near, to_far), (far, to_near))]

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)


def ports_of(source: FeedSource) -> tuple[int, int]:
    assert source.replay_endpoint is not None
    return int(source.endpoint.rpartition(":")[2]), int(source.replay_endpoint.rpartition(":")[2])


def held(index: MemoryIndex, name: str = "a") -> int:
    return index.count("m", BLOCKS.chain(TOKENS)).get(name, 0)


def complete(feed: PodFeed) -> bool:
    return feed.state is FeedState.COMPLETE
