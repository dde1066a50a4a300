"""Writes what an engine publishes, is asked and answers to a capture that `matrixinfer events check` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import zmq
import zmq.asyncio

from matrixinfer.feedtools.capture_file import CaptureWriter

_END = b"\xff" * 8


class Recording:
    """Takes frames from the engine's replay socket, so that each lies before the request that may rest on it."""

    def __init__(self, file: Path, endpoint: str, meta: Mapping[str, Any]) -> None:
        self._writer = CaptureWriter(file)
        self._endpoint = endpoint
        self._meta = meta
        self._context = zmq.asyncio.Context()
        self._next = 0
        self._requests = 0

    async def __aenter__(self) -> Self:
        self._writer.__enter__()
        self._writer.write({"kind": "meta", **self._meta})
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(self._endpoint)
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._socket.close()
        self._context.term()
        self._writer.__exit__(None, None, None)

    async def add(self, body: Mapping[str, Any], prompt: Sequence[int], cached: int) -> None:
        """A request that was answered. Its own events come after it."""
        label = f"r{self._requests}"
        self._requests += 1
        kept = {key: body[key] for key in ("model", "max_tokens", "cache_salt") if key in body}
        self._writer.write({"kind": "request", "label": label, "body": kept, "prompt_token_ids": prompt})
        details = {"cached_tokens": cached}
        self._writer.write({"kind": "response", "label": label, "usage": {"prompt_tokens_details": details}})

    async def take_frames(self) -> None:
        """Write every frame that was published since the last call."""
        await self._socket.send_multipart([b"", self._next.to_bytes(8, "big")])
        while (frames := await self._socket.recv_multipart())[-2] != _END:
            number = int.from_bytes(frames[-2], "big")
            self._writer.write({"kind": "event", "seq": number, "payload_hex": frames[-1].hex()})
            self._next = number + 1
