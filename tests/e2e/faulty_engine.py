"""An engine as a process that can be told to fail: `python -m tests.e2e.faulty_engine PORT`.

`/health`, `/v1/models` and `/metrics` are always well. `PUT /fault/MODE` sets how prompts are answered from then on.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys

OK = b'{"id":"x","object":"text_completion","choices":[{"index":0,"text":"ok","finish_reason":"stop"}]}'
MODELS = b'{"object":"list","data":[{"id":"m","object":"model","owned_by":"vllm","parent":null}]}'
ERROR = b'{"error":{"message":"no","type":"server_error","param":null,"code":null}}'
STATUSES = {"500": b"500 Internal Server Error", "503": b"503 Service Unavailable", "429": b"429 Too Many Requests"}
CHUNKS = 10
PAUSE_SECONDS = 0.02
SLOW_SECONDS = 1.0


class Engine:
    """Answers on every connection until its peer leaves."""

    def __init__(self) -> None:
        self.mode = "ok"

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                method, path = head.split(b" ", 2)[:2]
                length = next(
                    (int(line[15:]) for line in head.lower().split(b"\r\n") if line[:15] == b"content-length:"), 0
                )
                body = await reader.readexactly(length)
                if method == b"PUT":
                    self.mode = path.rpartition(b"/")[2].decode()
                if method == b"POST" and path.startswith(b"/v1/"):
                    await self.generate(body, writer)
                else:
                    writer.write(response(b"200 OK", MODELS if path == b"/v1/models" else b""))
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def generate(self, body: bytes, writer: asyncio.StreamWriter) -> None:
        """Answer a prompt, as the mode says."""
        if self.mode in STATUSES:
            writer.write(response(STATUSES[self.mode], ERROR, b"Retry-After: 1\r\n" if self.mode != "500" else b""))
        elif self.mode == "reset":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise ConnectionResetError
        elif self.mode == "garbage":
            writer.write(b"\x00\x01 this is no HTTP\r\n\r\n")
            raise ConnectionResetError
        else:
            await asyncio.sleep(SLOW_SECONDS if self.mode == "slow" else PAUSE_SECONDS)
            if b'"stream": true' not in body:
                writer.write(response(b"200 OK", OK))
                return
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(CHUNKS):
                event = b"data: " + OK + b"\n\n"
                writer.write(b"%x\r\n%s\r\n" % (len(event), event))
                await writer.drain()
                await asyncio.sleep(PAUSE_SECONDS)
            writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


def response(status: bytes, body: bytes, fields: bytes = b"") -> bytes:
    """A whole answer."""
    return b"HTTP/1.1 %s\r\n%sContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
        status,
        fields,
        len(body),
        body,
    )


async def main(port: int) -> None:
    """Serve until killed."""
    server = await asyncio.start_server(Engine().talk, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
