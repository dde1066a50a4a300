"""Ports for servers that cannot choose one themselves, or that come back on the port they had.

The system hands out ephemeral ports to any process at any time, so a port that was free a moment ago may be taken when a
server binds it. Ports from here lie below that range. A process claims a block of them by listening on its first port,
which keeps every other test process of this machine away from the rest of the block.
"""

from __future__ import annotations

import random
import socket

FIRST, LAST, SIZE = 10_240, 32_256, 64


class PortBlocks:
    """Hands out each port once."""

    def __init__(self) -> None:
        self._claims: list[socket.socket] = []
        self._next = self._end = 0

    def next(self, count: int = 1) -> int:
        """The first of `count` consecutive ports that nobody listens on, and that nobody else is given."""
        assert count < SIZE
        while True:
            if self._end - self._next < count:
                self._claim()
            first, self._next = self._next, self._next + count
            if all(map(_is_free, range(first, first + count))):
                return first

    def _claim(self) -> None:
        starts = list(range(FIRST, LAST, SIZE))
        random.SystemRandom().shuffle(starts)
        for start in starts:
            claim = socket.socket()
            try:
                claim.bind(("127.0.0.1", start))
                claim.listen(1)
            except OSError:
                claim.close()
                continue
            self._claims.append(claim)
            self._next, self._end = start + 1, start + SIZE
            return
        raise RuntimeError(f"no block of ports between {FIRST} and {LAST} is free")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


_blocks = PortBlocks()


def free_port() -> int:
    """A port below the ephemeral range that nobody listens on; no second call returns it."""
    return _blocks.next()


def consecutive_ports(count: int) -> int:
    """The first of `count` such ports in a row, as data-parallel ranks use them."""
    return _blocks.next(count)


def two_ports() -> tuple[int, int]:
    """Two ports: for an engine's publisher and its replays."""
    return free_port(), free_port()
