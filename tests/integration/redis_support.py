"""Groups of servers, and a proxy between a server and its clients."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import cast

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config import RedisConfig
from matrixinfer.index.redis.index import RedisIndex
from matrixinfer.index.redis.store import Store
from tests.ports import free_port
from tests.servers import Server, cluster_options, server
from tests.waiting import DEADLINE_SECONDS, wait_until

BLOCKS = TokenBlockProcessor()


@asynccontextmanager
async def opened(config: RedisConfig, *, max_age: float = 86_400.0) -> AsyncIterator[RedisIndex]:
    """An open index."""
    async with Store(config) as store, RedisIndex(store, BLOCKS, max_age=max_age) as index:
        yield index


class Proxy:
    """Forwards bytes, optionally with TLS towards its clients, and can hold back what connections send."""

    def __init__(self, upstream: int, tls: ssl.SSLContext | None = None) -> None:
        self.port = 0
        self.connections = 0
        self._upstream = upstream
        self._tls = tls
        self._held: list[asyncio.Event] = []
        self._late: list[asyncio.Task[None]] = []
        self._holding = False
        self._stack = AsyncExitStack()
        self._tasks: set[asyncio.Task[None]] = set()

    def hold(self) -> None:
        """From now on forward nothing that the open connections send, not even that they close."""
        self._holding = True

    def pass_on(self) -> None:
        """Forward new connections again; what is held back stays held back."""
        self._holding = False

    def deliver(self) -> None:
        """Forward what was held back."""
        for held in self._held:
            held.set()

    async def settled(self) -> None:
        """Wait until the server has received what was held back and has closed the connections."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            await asyncio.gather(*self._late)

    async def __aenter__(self) -> Proxy:
        listener = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self._stack.push_async_callback(self._close, listener)
        self.port = listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _close(self, listener: asyncio.Server) -> None:
        listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            back, forth = await asyncio.open_connection("127.0.0.1", self._upstream)
            answers = asyncio.create_task(self._pump(back, writer))
            await self._pump(reader, forth, hold=True)
            await answers
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, hold: bool = False) -> None:
        try:
            while data := await reader.read(65_536):
                if hold and self._holding:
                    released = asyncio.Event()
                    self._held.append(released)
                    self._late.append(cast("asyncio.Task[None]", asyncio.current_task()))
                    await released.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()


def certificates(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A self-signed certificate for `localhost`, and a server context with it."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        (
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)),
        ),
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return certificate, context


@contextmanager
def cluster(folder: Path) -> Iterator[list[Server]]:
    """Start a Cluster of three servers."""
    with ExitStack() as stack:
        nodes: list[tuple[Server, int]] = []
        for n in range(3):
            bus = free_port()
            options = (*cluster_options(bus=bus), "--cluster-node-timeout", "15000")
            nodes.append((stack.enter_context(server(folder / str(n), *options)), bus))
        for n, (node, _) in enumerate(nodes):
            with node.client() as client:
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", n * 5462, min(n * 5462 + 5461, 16_383))
                for other, bus in nodes[:n]:
                    client.execute_command("CLUSTER", "MEET", "127.0.0.1", other.port, bus)
        for node, _ in nodes:
            wait_until(partial(_is_whole, node))
        yield [node for node, _ in nodes]


def _is_whole(node: Server) -> bool:
    with node.client() as client:
        info = str(client.execute_command("CLUSTER", "INFO"))
    return "cluster_state:ok" in info and "cluster_known_nodes:3" in info


@contextmanager
def sentinels(folder: Path, master: Server) -> Iterator[tuple[str, ...]]:
    """Start three Sentinels that watch a master."""
    with ExitStack() as stack:
        addresses = []
        for n in range(3):
            port, home = free_port(), folder / f"sentinel-{n}"
            home.mkdir()
            (home / "conf").write_text(
                f"port {port}\nbind 127.0.0.1\ndir {home}\nlogfile {home}/log\n"
                f"sentinel monitor mymaster 127.0.0.1 {master.port} 2\n"
                "sentinel down-after-milliseconds mymaster 3000\nsentinel failover-timeout mymaster 9000\n"
            )
            process = subprocess.Popen([master.executable, str(home / "conf"), "--sentinel"])
            stack.callback(process.wait)
            stack.callback(process.kill)
            addresses.append(f"127.0.0.1:{port}")
        yield tuple(addresses)
