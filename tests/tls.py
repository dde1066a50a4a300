"""Certificates of authorities that exist for one test, and servers that use them."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trustme
from aiohttp import web
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)


class Files:
    """The files of a certificate, which may be replaced."""

    def __init__(self, folder: Path, name: str) -> None:
        self.cert_file, self.key_file = str(folder / f"{name}.pem"), str(folder / f"{name}.key")

    def write(self, certificate: trustme.LeafCert) -> Files:
        Path(self.key_file).write_bytes(certificate.private_key_pem.bytes())
        Path(self.cert_file).write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
        return self


def put(file: str, content: bytes) -> None:
    """Replace a file."""
    Path(file).write_bytes(content)


def encrypt(key_file: str) -> None:
    """Protect a key with a password."""
    key = load_pem_private_key(Path(key_file).read_bytes(), None)
    put(key_file, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))


def authority(folder: Path, name: str) -> tuple[trustme.CA, str]:
    """An authority, and the file of its certificate."""
    ca, file = trustme.CA(), folder / f"{name}.pem"
    ca.cert_pem.write_to_path(str(file))
    return ca, str(file)


def client_context(ca_file: str, files: Files | None = None) -> ssl.SSLContext:
    """What a client trusts and shows."""
    context = ssl.create_default_context(cafile=ca_file)
    if files is not None:
        context.load_cert_chain(files.cert_file, files.key_file)
    return context


@asynccontextmanager
async def tls_server(
    handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]], files: Files, client_ca: str | None = None
) -> AsyncIterator[int]:
    """A server with that certificate, which asks for one of the clients of `client_ca`; its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.cert_file, files.key_file)
    if client_ca is not None:
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    server = web.Server(handler, handler_cancellation=True, access_log=None)
    listening = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0, ssl=context)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()
        server.pre_shutdown()
        await server.shutdown(0.1)
