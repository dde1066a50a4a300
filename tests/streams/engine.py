"""An engine that streams numbered pieces slowly: `python -m tests.streams.engine PORT PIECES PAUSE`.

Piece `I` of the answer to the prompt `N` is `N.I`, so that a client sees whether all of its own pieces have come, in order.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
PAGES = {
    b"/v1/models": json.dumps(
        {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "vllm"}]}
    ).encode(),
    b"/health": b"",
    b"/metrics": b"",
}
_PROMPT = re.compile(rb'"prompt": ?"(\d+)"')
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pieces: int, pause: float) -> None:
    """Serve one connection until its peer leaves."""
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            path = head.split(b" ", 2)[1]
            length = _LENGTH.search(head)
            body = await reader.readexactly(0 if length is None else int(length[1]))
            prompt = _PROMPT.search(body)
            if path == b"/v1/completions" and prompt is not None:
                await stream(writer, prompt[1], pieces, pause)
            else:
                page = PAGES.get(path)
                status, page = (b"404 Not Found", b"") if page is None else (b"200 OK", page)
                writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(page), page))
            await writer.drain()
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


async def stream(writer: asyncio.StreamWriter, prompt: bytes, pieces: int, pause: float) -> None:
    """A streamed answer."""
    writer.write(HEAD)
    for number in range(pieces):
        event = b'data: {"id":"x","choices":[{"index":0,"text":"%s.%d"}]}\n\n' % (prompt, number)
        writer.write(b"%x\r\n%s\r\n" % (len(event), event))
        await writer.drain()
        await asyncio.sleep(pause)
    writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


async def main(port: int, pieces: int, pause: float) -> None:
    """Serve until killed."""
    server = await asyncio.start_server(
        lambda reader, writer: talk(reader, writer, pieces, pause), "127.0.0.1", port, backlog=4096
    )
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
