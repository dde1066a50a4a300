"""TLS of a listener, with real handshakes: new certificates, broken ones, and clients that must show theirs."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog
import trustme
from aiohttp import web
from structlog.testing import capture_logs

from matrixinfer.config import ConnectionsConfig, ListenerTlsConfig
from matrixinfer.errors import ConfigError
from matrixinfer.gateway import handshakes
from matrixinfer.gateway.listener import Listener
from matrixinfer.gateway.tls import ListenerTls
from tests.tls import Files, authority, client_context, encrypt, put
from tests.waiting import DEADLINE_SECONDS, eventually

HOST = "127.0.0.1"


async def hello(request: web.BaseRequest) -> web.StreamResponse:
    await request.read()
    return web.Response(text="hello")


@asynccontextmanager
async def listener(config: ListenerTlsConfig, *, most: int | None = None) -> AsyncIterator[Listener]:
    tls = ListenerTls(config, "$.tls")
    connections = ConnectionsConfig(head_timeout_seconds=DEADLINE_SECONDS)
    routes = {"/": {"GET": hello, "POST": hello}}
    async with Listener(
        HOST, 0, routes, asyncio.Event(), connections=connections, max_connections=most, tls=tls
    ) as listening:
        yield listening


async def fetch(url: str, context: ssl.SSLContext) -> str:
    async with aiohttp.ClientSession() as session, session.get(url, ssl=context) as response:
        return await response.text()


async def serial(listening: Listener, context: ssl.SSLContext) -> bytes:
    """The certificate that a new handshake is shown."""
    port = int(listening.url.rpartition(":")[2])
    _, writer = await asyncio.open_connection(HOST, port, ssl=context)
    found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    assert isinstance(found, bytes)
    return found


@pytest.fixture
def made(tmp_path: Path) -> tuple[trustme.CA, str, Files]:
    ca, ca_file = authority(tmp_path, "ca")
    return ca, ca_file, Files(tmp_path, "server").write(ca.issue_cert(HOST))


def config(files: Files, **more: Any) -> ListenerTlsConfig:
    return ListenerTlsConfig(
        **{"cert_file": files.cert_file, "key_file": files.key_file, "reload_seconds": 0.05, **more}
    )


async def test_requests_come_over_tls_and_nothing_else_is_understood(made: tuple[trustme.CA, str, Files]) -> None:
    _, ca_file, files = made
    async with listener(config(files)) as listening:
        assert listening.url.startswith("https://")
        assert await fetch(listening.url, client_context(ca_file)) == "hello"
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await fetch(listening.url, ssl.create_default_context())
        with pytest.raises(aiohttp.ClientError):
            await fetch(listening.url.replace("https", "http"), client_context(ca_file))
        assert await fetch(listening.url, client_context(ca_file)) == "hello"


async def test_connections_without_a_handshake_make_room_for_others(made: tuple[trustme.CA, str, Files]) -> None:
    _, ca_file, files = made
    async with listener(config(files), most=3) as listening, aiohttp.ClientSession() as session:
        context, port = client_context(ca_file), int(listening.url.rpartition(":")[2])
        async with session.get(listening.url, ssl=context) as response:
            assert await response.text() == "hello"
        silent = [await asyncio.open_connection(HOST, port) for _ in range(20)]
        assert await fetch(listening.url, context) == "hello"
        async with session.get(listening.url, ssl=context) as response:  # on the connection that it has
            assert await response.text() == "hello"
        for reader, _ in silent[:17]:
            assert await reader.read() == b""
        for _, writer in silent:
            writer.close()


async def test_where_the_system_can_make_no_connection_one_is_made_later(
    made: tuple[trustme.CA, str, Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ca_file, files = made
    accept, failures = socket.socket.accept, iter([OSError(errno.EMFILE, "none is free"), ConnectionAbortedError()])

    def accepted(listening: socket.socket) -> Any:
        if (failure := next(failures, None)) is not None:
            raise failure
        return accept(listening)

    monkeypatch.setattr(handshakes, "_REST_SECONDS", 0.01)
    monkeypatch.setattr(socket.socket, "accept", accepted)
    async with listener(config(files)) as listening:
        with capture_logs() as logs:
            assert await fetch(listening.url, client_context(ca_file)) == "hello"
    assert next(failures, None) is None
    assert [entry for entry in logs if entry["event"] == "resources_ran_out"] == [
        {
            "event": "resources_ran_out",
            "log_level": "warning",
            "place": "clients",
            "reason": "this process has no free file descriptor",
        }
    ]


async def test_no_more_connections_than_the_limit_are_served(made: tuple[trustme.CA, str, Files]) -> None:
    _, ca_file, files = made
    async with listener(config(files), most=2) as listening:
        context, port = client_context(ca_file), int(listening.url.rpartition(":")[2])
        held = [await asyncio.open_connection(HOST, port, ssl=context) for _ in range(2)]
        reader, writer = await asyncio.open_connection(HOST, port, ssl=context)
        assert (await reader.readline()).split()[1] == b"503"
        for _, each in (*held, (reader, writer)):
            each.close()
        assert await fetch_until_it_works(listening.url, context) == "hello"


async def fetch_until_it_works(url: str, context: ssl.SSLContext) -> str:
    found: list[str] = []

    async def works() -> bool:
        async with aiohttp.ClientSession() as session, session.get(url, ssl=context) as response:
            found.append(await response.text())
            return response.status == 200

    await eventually(works)
    return found[-1]


async def test_the_next_handshake_uses_a_new_certificate_and_open_connections_stay(
    made: tuple[trustme.CA, str, Files],
) -> None:
    ca, ca_file, files = made
    context = client_context(ca_file)
    async with listener(config(files)) as listening, aiohttp.ClientSession() as session:
        before = await serial(listening, context)
        async with session.get(listening.url, ssl=context) as response:
            assert await response.text() == "hello"
        files.write(ca.issue_cert(HOST))

        async def is_new() -> bool:
            return await serial(listening, context) != before

        await eventually(is_new, pause=0.05)
        async with session.get(listening.url, ssl=context) as response:  # on the same connection
            assert await response.text() == "hello"


@pytest.mark.parametrize("broken", [b"", b"-----BEGIN CERTIFICATE-----\nnone\n", None])
async def test_a_broken_pair_keeps_the_old_one_and_says_so(
    made: tuple[trustme.CA, str, Files], broken: bytes | None
) -> None:
    ca, ca_file, files = made
    context = client_context(ca_file)
    with structlog.testing.capture_logs() as logs:
        async with listener(config(files)) as listening:
            before = await serial(listening, context)
            if broken is None:  # the key of another certificate
                put(files.key_file, ca.issue_cert(HOST).private_key_pem.bytes())
            else:
                put(files.cert_file, broken)
            await eventually(lambda: any(line["event"] == "tls_not_reloaded" for line in logs))
            assert await serial(listening, context) == before
            files.write(ca.issue_cert(HOST))
            await eventually(lambda: logs[-1]["event"] == "tls_reloaded")
            assert await serial(listening, context) != before
    failures = [line for line in logs if line["event"] == "tls_not_reloaded"]
    assert {line["section"] for line in failures} == {"$.tls"}


async def test_only_clients_of_the_authority_are_let_in_also_after_it_was_replaced(
    made: tuple[trustme.CA, str, Files], tmp_path: Path
) -> None:
    _, ca_file, files = made
    clients, clients_file = authority(tmp_path, "clients")
    stranger, _ = authority(tmp_path, "stranger")
    ours = Files(tmp_path, "ours").write(clients.issue_cert("ours@example.com"))
    theirs = Files(tmp_path, "theirs").write(stranger.issue_cert("theirs@example.com"))
    async with listener(config(files, client_ca_file=clients_file)) as listening:

        async def is_let_in(shown: Files | None) -> bool:
            try:
                return await fetch(listening.url, client_context(ca_file, shown)) == "hello"
            except aiohttp.ClientError:
                return False

        assert await is_let_in(ours)
        assert not await is_let_in(None)
        assert not await is_let_in(theirs)
        stranger.cert_pem.write_to_path(clients_file)
        await eventually(lambda: is_let_in(theirs), pause=0.05)
        assert not await is_let_in(ours)
        assert not await is_let_in(None)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_no_session_outlasts_the_trust_in_its_client(
    made: tuple[trustme.CA, str, Files], tmp_path: Path, version: ssl.TLSVersion
) -> None:
    _, ca_file, files = made
    clients, clients_file = authority(tmp_path, "clients")
    stranger, _ = authority(tmp_path, "stranger")
    context = client_context(ca_file, Files(tmp_path, "ours").write(clients.issue_cert("ours@example.com")))
    context.maximum_version = version
    async with listener(config(files, client_ca_file=clients_file)) as listening:
        port = int(listening.url.rpartition(":")[2])

        def ask(session: ssl.SSLSession | None) -> ssl.SSLSession | None:
            """Send a request, and return the session with which the next one may begin. Raises `OSError`."""
            with (
                socket.create_connection((HOST, port), timeout=DEADLINE_SECONDS) as plain,
                context.wrap_socket(plain, server_hostname=HOST, session=session) as secure,
            ):
                secure.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                if not secure.recv(100):
                    raise ConnectionError("no answer")
                return secure.session

        session = await asyncio.to_thread(ask, None)
        await asyncio.to_thread(ask, session)
        stranger.cert_pem.write_to_path(clients_file)

        async def is_let_in(session: ssl.SSLSession | None) -> bool:
            try:
                await asyncio.to_thread(ask, session)
            except OSError:
                return False
            return True

        async def is_out() -> bool:
            return not await is_let_in(None)

        await eventually(is_out, pause=0.05)
        assert not await is_let_in(session)


async def test_old_versions_are_refused(made: tuple[trustme.CA, str, Files]) -> None:
    _, ca_file, files = made
    old = client_context(ca_file)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    async with listener(config(files, min_version="1.3")) as listening:
        with pytest.raises(aiohttp.ClientError):
            await fetch(listening.url, old)
        assert await fetch(listening.url, client_context(ca_file)) == "hello"
    async with listener(config(files)) as listening:
        assert await fetch(listening.url, old) == "hello"


async def test_a_head_that_is_too_large_is_answered_over_tls_too(made: tuple[trustme.CA, str, Files]) -> None:
    _, ca_file, files = made
    async with listener(config(files)) as listening:
        port = int(listening.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection(HOST, port, ssl=client_context(ca_file))
        writer.write(b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 5000 + b"\r\n")
        for _ in range(20):
            writer.write(b"x: " + b"y" * 5000 + b"\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 431 ")
        writer.close()


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"cert_file": "/nowhere.pem"}, "$.tls.certFile"),
        ({"key_file": "/nowhere.key"}, "$.tls.keyFile"),
        ({"client_ca_file": "/nowhere.ca"}, "$.tls.clientCaFile"),
    ],
)
async def test_files_that_cannot_be_read_end_the_start_with_their_key(
    made: tuple[trustme.CA, str, Files], change: dict[str, str], path: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        async with listener(config(made[2], **change)):
            pass
    assert caught.value.path == path


async def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_its_password(
    made: tuple[trustme.CA, str, Files],
) -> None:
    files = made[2]
    encrypt(files.key_file)
    with pytest.raises(ConfigError, match="unencrypted key"):
        async with listener(config(files)):
            pass
