"""An engine as a process that can be told to fail: `python -m tests.e2e.faulty_engine PORT [RANKS [MODEL]]`.

`/health`, `/v1/models` and `/metrics` are always well. `PUT /fault/MODE` sets how prompts are answered from then on;
`PUT /fault/MODE?rank=N` only those that are sent to data-parallel rank N.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import struct
import sys

OK = b'{"id":"x","object":"text_completion","choices":[{"index":0,"text":"ok","finish_reason":"stop"}]}'
ERROR = b'{"error":{"message":"no","type":"server_error","param":null,"code":null}}'
STATUSES = {"500": b"500 Internal Server Error", "503": b"503 Service Unavailable", "429": b"429 Too Many Requests"}
CURSED = b"cursed"
"""A prompt with this word is answered with 500 by every engine, whatever its mode."""
CHUNKS = 10
PAUSE_SECONDS = 0.02
SLOW_SECONDS = 1.0
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
MODES = ("ok", *STATUSES, "reset", "garbage", "slow", "broken", "silent", "deaf")
"""`broken`: breaks off after some bytes of an answer. `silent`: sends headers, and then nothing. `deaf`: reads no body."""


class Engine:
    """Answers on every connection until its peer leaves."""

    def __init__(self, ranks: int, model: str) -> None:
        self.modes: dict[bytes | None, str] = {}
        """By rank, and for all others."""
        self.changed = asyncio.Event()
        card = {"id": model, "object": "model", "owned_by": "vllm", "parent": None}
        source = {"publisher": "zmq", "endpoint": "tcp://*:9", "replay_endpoint": None, "topic": ""}
        self.pages = {
            b"/v1/models": json.dumps({"object": "list", "data": [card]}).encode(),
            b"/health": b"",
            b"/metrics": b"",
        }
        if ranks > 1:
            self.pages[b"/kv_event_sources"] = json.dumps({str(rank): source for rank in range(ranks)}).encode()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                method, path = head.split(b" ", 2)[:2]
                mode = self.mode(field(head, b"x-data-parallel-rank"))
                is_prompt = method == b"POST" and path.startswith(b"/v1/")
                if is_prompt and mode == "deaf":
                    await self.changed.wait()
                    return
                body = await reader.readexactly(int(field(head, b"content-length") or 0))
                if method == b"PUT":
                    self.set(path)
                if is_prompt:
                    await self.generate(body, writer, mode)
                elif method == b"GET" and path not in self.pages:
                    writer.write(response(b"404 Not Found", b""))
                else:
                    writer.write(response(b"200 OK", self.pages.get(path, b"")))
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def mode(self, rank: bytes | None) -> str:
        """How prompts to a rank are answered."""
        return self.modes.get(rank) or self.modes.get(None, "ok")

    def set(self, path: bytes) -> None:
        """Have a rank, or all of them, answer in another way."""
        mode, _, rank = path.rpartition(b"/")[2].partition(b"?rank=")
        if not rank:
            self.modes.clear()
        self.modes[rank or None] = mode.decode()
        self.changed.set()
        self.changed = asyncio.Event()

    async def generate(self, body: bytes, writer: asyncio.StreamWriter, mode: str) -> None:
        """Answer a prompt, as the mode says."""
        if CURSED in body:
            writer.write(response(STATUSES["500"], ERROR))
        elif mode in STATUSES:
            writer.write(response(STATUSES[mode], ERROR, b"Retry-After: 1\r\n" if mode != "500" else b""))
        elif mode == "reset":
            reset(writer)
        elif mode == "garbage":
            writer.write(b"\x00\x01 this is no HTTP\r\n\r\n")
            raise ConnectionResetError
        elif mode == "silent":
            writer.write(HEAD)
            await self.changed.wait()
            raise ConnectionResetError
        else:
            await asyncio.sleep(SLOW_SECONDS if mode == "slow" else PAUSE_SECONDS)
            breaks_after = random.randrange(CHUNKS) if mode == "broken" else None
            if re.search(rb'"stream": ?true', body):
                await stream(writer, breaks_after)
            elif breaks_after is None:
                writer.write(response(b"200 OK", OK))
            else:
                writer.write(response(b"200 OK", OK)[:-breaks_after])
                raise ConnectionResetError


async def stream(writer: asyncio.StreamWriter, breaks_after: int | None) -> None:
    """A streamed answer, or its beginning."""
    writer.write(HEAD)
    for number in range(CHUNKS):
        if number == breaks_after:
            reset(writer)
        event = b"data: " + OK + b"\n\n"
        writer.write(b"%x\r\n%s\r\n" % (len(event), event))
        await writer.drain()
        await asyncio.sleep(PAUSE_SECONDS)
    writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


def field(head: bytes, name: bytes) -> bytes | None:
    """The value of a header."""
    found = re.search(rb"\r\n" + name + rb": *([^\r]*)", head, flags=re.IGNORECASE)
    return None if found is None else found[1]


def reset(writer: asyncio.StreamWriter) -> None:
    """Break the connection, so that its peer sees an error and not an end. Raises `ConnectionResetError`."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raise ConnectionResetError


def response(status: bytes, body: bytes, fields: bytes = b"") -> bytes:
    """A whole answer."""
    return b"HTTP/1.1 %s\r\n%sContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
        status,
        fields,
        len(body),
        body,
    )


async def main(port: int, ranks: int = 1, model: str = "m") -> None:
    """Serve until killed."""
    server = await asyncio.start_server(Engine(ranks, model).talk, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 1, *sys.argv[3:]))
