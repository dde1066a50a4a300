"""An engine process that misbehaves on command, and tells the truth when asked.

Its cache is the simulated engine's; what it publishes is what that cache did. Commands come as JSON lines on stdin,
`{"do": name, …}`, each answered by one line on stdout. Run it as `hostile_engine.py LIVE_PORT REPLAY_PORT`.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import deque
from typing import Any

import msgspec
import numpy as np
import zmq

from matrixinfer.blocks import TokenBlockProcessor, token_bytes
from matrixinfer.sim.cache import PagedPrefixCache
from matrixinfer.sim.events import BlockStored, Event
from matrixinfer.sim.sequence import Sequence

BLOCK = 16
_END = b"\xff" * 8


class Brain:
    """A cache at work, and what a perfect follower would know of it."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._cache = PagedPrefixCache(100, BLOCK)
        self._blocks = TokenBlockProcessor(BLOCK)
        self._names: dict[int, int] = {}  # engine hash -> token block
        self._parents: dict[int, int | None] = {}
        self._prefixes = [self._text(self._random.randrange(2, 6)) for _ in range(6)]

    def step(self) -> list[Event]:
        """Serve one request, whose prompt shares its beginning with others; what that changed."""
        events: list[Event] = []
        while not events:
            prompt = self._random.choice(self._prefixes) + self._text(self._random.randrange(4))
            sequence = Sequence(np.array(prompt, dtype="u4"), BLOCK)
            self._cache.allocate(sequence, len(prompt), self._cache.lookup(sequence))
            self._cache.release(sequence)
            events = self._noted(self._cache.take_events())
        return events

    def clear(self) -> list[Event]:
        """Drop everything."""
        self._cache.reset()
        return self._cache.take_events()

    def truth(self) -> list[int]:
        """The token blocks that a prompt can reach."""
        cached = set(self._cache.cached_hashes())
        return [self._names[block] for block in cached if self._reachable(block, cached)]

    def _reachable(self, block: int | None, cached: set[int]) -> bool:
        return block is None or (block in cached and self._reachable(self._parents[block], cached))

    def _noted(self, events: list[Event]) -> list[Event]:
        for event in events:
            if isinstance(event, BlockStored):
                parent = event.parent_block_hash
                before = None if parent is None else self._names[parent]
                tokens = token_bytes(np.array(event.token_ids, dtype="u4"))
                for block, name in zip(event.block_hashes, self._blocks.hashes(tokens, before), strict=True):
                    self._names[block], self._parents[block] = name, parent
                    parent = block
        return events

    def _text(self, blocks: int) -> list[int]:
        return [self._random.randrange(100_000) for _ in range(blocks * BLOCK)]


class Engine:
    """The sockets, and the ways to misuse them. Each public method is a command."""

    def __init__(self, ports: tuple[int, int]) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._pub, self._router = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
        for socket, port in zip((self._pub, self._router), ports, strict=True):
            socket.bind(f"tcp://127.0.0.1:{port}")
        self._buffered = 10_000
        self._holes: deque[list[int]] = deque()
        self._endless = 0
        self._clears = 0
        self._pause = 0.0
        self._asked: list[int] = []
        self.restart()

    def ports(self) -> list[int]:
        """Where it listens."""
        return [int(s.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2]) for s in (self._pub, self._router)]

    def restart(self, buffered: int = 10_000) -> None:
        """Forget everything, as a process that starts, but keep the connections, as a relay does."""
        self._brain = Brain(seed=time.time_ns())
        self._next = 0
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=buffered)

    def publish(self, batches: int = 1, *, lost: bool = False, clear: bool = False, padding: int = 0) -> None:
        """Serve requests, one batch each; `lost` ones never reach the live socket."""
        for _ in range(batches):
            events = [*(self._brain.clear() if clear else ()), *self._brain.step()]
            self._send(msgspec.msgpack.encode([time.time(), events, 0, bytes(padding)]), lost=lost)

    def garbage(self, *, lost: bool = False) -> None:
        """Change something, but publish it as bytes that nobody can read; and messages that are no frames at all."""
        self._brain.step()
        self._send(b"\xc1 garbage", lost=lost)
        for parts in ([b""], [b"", b"short", b"x"], [b"", b"", b"", b""], [b"", bytes(8)]):
            self._pub.send_multipart(parts)

    def holes(self, answers: list[list[int]]) -> None:
        """Leave out these numbers from the next answers, as a ROUTER does whose queue is full."""
        self._holes.extend(answers)

    def endless(self, answers: int) -> None:
        """Send no end marker with the next answers."""
        self._endless = answers

    def clear_within(self, replays: int) -> None:
        """In the middle of the next answers drop everything, go on, and publish it."""
        self._clears = replays

    def pace(self, pause: float) -> None:
        """Rest after every hundredth frame of an answer, so that only a slow reader fills the queue."""
        self._pause = pause

    def truth(self) -> dict[str, Any]:
        """What it holds, how many batches it published, and from which numbers replays were asked for."""
        return {"next": self._next, "blocks": self._brain.truth(), "asked": self._asked}

    def _send(self, payload: bytes, *, lost: bool) -> None:
        if not lost:
            self._pub.send_multipart([b"", self._next.to_bytes(8, "big"), payload])
        self._buffer.append((self._next, payload))
        self._next += 1

    def answer(self) -> None:
        """Answer one replay request, at once and without a thought for its reader, as vLLM does."""
        peer, _, start = self._router.recv_multipart()
        first = int.from_bytes(start, "big")
        self._asked.append(first)
        frames = [frame for frame in self._buffer if frame[0] >= first]
        holes = self._holes.popleft() if self._holes else []
        for position, (number, payload) in enumerate(frames):
            if self._pause and position % 100 == 0:
                time.sleep(self._pause)
            if self._clears and position == len(frames) // 2:
                self._clears -= 1
                self.publish(3)
                self.publish(2, clear=True)
            if number not in holes:
                self._router.send_multipart([peer, b"", b"", number.to_bytes(8, "big"), payload], zmq.NOBLOCK)
        if self._endless:
            self._endless -= 1
        else:
            self._router.send_multipart([peer, b"", b"", _END, b""], zmq.NOBLOCK)

    def run(self) -> None:
        """Serve until stdin closes."""
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(sys.stdin.fileno(), zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._router in ready:
                self.answer()
            if sys.stdin.fileno() in ready:
                line = sys.stdin.readline()
                if not line:
                    return
                command = json.loads(line)
                result = getattr(self, command.pop("do"))(**command)
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    Engine((int(sys.argv[1]), int(sys.argv[2]))).run()
    zmq.Context.instance().destroy(linger=0)
