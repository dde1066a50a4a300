"""A name server that answers what a test wants, over UDP and TCP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

import dns.flags
import dns.message
import dns.rcode
import dns.rrset

from tests.ports import free_port


@dataclass
class NameServer:
    port: int
    records: dict[str, list[str]] = field(default_factory=dict)
    """By type: `A`, `AAAA`, `SRV`. A type that is missing has no records."""
    rcode: dns.rcode.Rcode = dns.rcode.NOERROR
    silent: set[str] = field(default_factory=set)
    """Types of which questions are not answered."""
    ttl: int = 0
    asked: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def answer(self, data: bytes) -> bytes | None:
        query = dns.message.from_wire(data)
        (question,) = query.question
        kind = question.rdtype.name
        self.asked.append(kind)
        if kind in self.silent:
            return None
        response = dns.message.make_response(query)
        response.flags |= dns.flags.RA
        response.set_rcode(self.rcode)
        if self.records.get(kind) and self.rcode == dns.rcode.NOERROR:
            response.answer.append(dns.rrset.from_text(question.name, self.ttl, "IN", kind, *self.records[kind]))
        return response.to_wire()


@asynccontextmanager
async def name_server() -> AsyncIterator[NameServer]:
    server = NameServer(free_port())

    class Protocol(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast("asyncio.DatagramTransport", transport)

        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            answer = server.answer(data)
            if answer is not None and len(answer) > 512:  # the question is asked again over TCP
                short = dns.message.make_response(dns.message.from_wire(data))
                short.flags |= dns.flags.TC
                answer = short.to_wire()
            if answer is not None:
                self.transport.sendto(answer, addr)

    async def over_tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = server.answer(await reader.readexactly(int.from_bytes(await reader.readexactly(2))))
        if answer is not None:
            writer.write(len(answer).to_bytes(2) + answer)
            await writer.drain()
        writer.close()

    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(Protocol, local_addr=("127.0.0.1", server.port))
    listening = await asyncio.start_server(over_tcp, "127.0.0.1", server.port)
    try:
        yield server
    finally:
        transport.close()
        listening.close()
