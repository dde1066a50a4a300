"""Engines behind certificates of a private authority: everything that the gateway asks them, and requests."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from matrixinfer.app.service import Service
from matrixinfer.config import Config, EngineTlsConfig, ListenerTlsConfig, PodConfig, PodWatchConfig, checked
from matrixinfer.config import parse as parse_config
from matrixinfer.errors import ConfigError
from matrixinfer.pods.engine_tls import EngineTls
from matrixinfer.pods.registry import PodRegistry
from tests.tls import Files, authority, client_context, put, tls_server
from tests.waiting import eventually

HOST = "127.0.0.1"
MODELS = b'{"data":[{"id":"m","object":"model","owned_by":"vllm"}]}'


async def engine(request: web.BaseRequest) -> web.StreamResponse:
    await request.read()
    if request.path == "/v1/models":
        return web.Response(body=MODELS)
    if request.path == "/v1/chat/completions":
        return web.Response(body=b'{"ok":true}', content_type="application/json")
    return web.Response(status=404)


def gateway(pods: Sequence[PodConfig], **more: object) -> Config:
    return checked(Config(listen=f"{HOST}:0", admin=None, pods=tuple(pods), **more))  # type: ignore[arg-type]


async def ask(service: Service, context: ssl.SSLContext | None = None) -> int:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    async with aiohttp.ClientSession() as session:
        url = f"{service.gateway.url}/v1/chat/completions"
        async with session.post(url, json=body, ssl=context or True) as response:
            await response.read()
            return response.status


def pod(name: str, port: int, tls: EngineTlsConfig | None = None, host: str = HOST) -> PodConfig:
    return PodConfig(name=name, url=f"https://{host}:{port}", kv_events="none", tls=tls)


async def test_each_engine_is_believed_by_its_own_authority_and_gets_its_own_certificate(tmp_path: Path) -> None:
    first, first_file = authority(tmp_path, "first")
    second, second_file = authority(tmp_path, "second")
    clients, clients_file = authority(tmp_path, "clients")
    shown = Files(tmp_path, "shown").write(clients.issue_cert("gateway@example.com"))
    one, other = (
        Files(tmp_path, "one").write(first.issue_cert(HOST)),
        Files(tmp_path, "b").write(second.issue_cert("b")),
    )
    async with (
        tls_server(engine, one) as a,
        tls_server(engine, other, clients_file) as b,
        tls_server(engine, other) as c,
    ):
        of_b = EngineTlsConfig(ca_file=second_file, cert_file=shown.cert_file, key_file=shown.key_file, server_name="b")
        common = EngineTlsConfig(ca_file=first_file)
        async with Service(gateway([pod("a", a), pod("b", b, of_b)], engine_tls=common)) as service:
            registry = service.engines.registry
            await eventually(lambda: all(each.base_model == "m" for each in registry.pods))
            service.join(pod("c", c, EngineTlsConfig(ca_file=second_file, server_name="b")))
            await eventually(lambda: registry.pods[-1].base_model == "m")
            assert [await ask(service) for _ in range(8)] == [200] * 8
            service.leave("a")
            assert await ask(service) == 200
            service.leave("c")
            assert await ask(service) == 200
            service.join(pod("a", a))
            service.leave("b")
            await eventually(lambda: registry.pods[-1].base_model == "m")
            assert await ask(service) == 200


@pytest.mark.parametrize("fault", ["authority", "name", "client"])
async def test_an_engine_that_is_not_believed_gets_nothing(tmp_path: Path, fault: str) -> None:
    ca, ca_file = authority(tmp_path, "ca")
    _, stranger_file = authority(tmp_path, "stranger")
    files = Files(tmp_path, "engine").write(ca.issue_cert("elsewhere" if fault == "name" else HOST))
    client_ca = stranger_file if fault == "client" else None
    tls = EngineTlsConfig(ca_file=stranger_file if fault == "authority" else ca_file)
    async with tls_server(engine, files, client_ca) as port, Service(gateway([pod("a", port, tls)])) as service:
        assert await ask(service) in (502, 503)
        assert service.engines.registry.pods[0].base_model is None


async def test_checks_can_be_turned_off(tmp_path: Path) -> None:
    ca, _ = authority(tmp_path, "ca")
    files = Files(tmp_path, "engine").write(ca.issue_cert("elsewhere"))
    tls = EngineTlsConfig(verify=False)
    async with tls_server(engine, files) as port, Service(gateway([pod("a", port, tls)])) as service:
        assert await ask(service) == 200


async def test_the_gateway_itself_may_speak_tls_on_both_sides(tmp_path: Path) -> None:
    ca, ca_file = authority(tmp_path, "ca")
    files = Files(tmp_path, "both").write(ca.issue_cert(HOST))
    listens = ListenerTlsConfig(cert_file=files.cert_file, key_file=files.key_file)
    async with tls_server(engine, files) as port:
        config = gateway([pod("a", port)], engine_tls=EngineTlsConfig(ca_file=ca_file), tls=listens)
        async with Service(config) as service:
            assert await ask(service, client_context(ca_file)) == 200


async def test_new_files_are_used_and_broken_ones_are_not(tmp_path: Path) -> None:
    _, ca_file = authority(tmp_path, "ca")
    config = gateway([pod("a", 1, EngineTlsConfig(ca_file=ca_file))])
    registry = PodRegistry(config.pods, (), PodWatchConfig(), clock=lambda: 0.0)
    tls = EngineTls(config, registry)
    tls.load()
    first = tls.at(HOST, 1).context
    await tls.reload()
    assert tls.at(HOST, 1).context is first
    put(ca_file, b"no certificate")
    await tls.reload()
    assert tls.at(HOST, 1).context is first
    authority(tmp_path, "ca")
    await tls.reload()
    assert tls.at(HOST, 1).context is not first


async def test_a_file_that_cannot_be_read_ends_the_start_with_its_key(tmp_path: Path) -> None:
    config = gateway([pod("a", 1, EngineTlsConfig(ca_file=str(tmp_path / "none.pem")))])
    with pytest.raises(ConfigError) as caught:
        async with Service(config):
            pass
    assert caught.value.path == "$.pods[0].tls.caFile"


def test_paths_start_from_the_folder_of_the_config_file(tmp_path: Path) -> None:
    text = """
tls: {certFile: a.pem, keyFile: /b.key}
engineTls: {caFile: ca.pem}
pods: [{name: p, url: "https://h:1", tls: {certFile: c.pem, keyFile: c.key}}]
"""
    config = parse_config(text, base=tmp_path)
    assert config.tls is not None
    assert (config.tls.cert_file, config.tls.key_file) == (str(tmp_path / "a.pem"), "/b.key")
    assert config.engine_tls == EngineTlsConfig(ca_file=str(tmp_path / "ca.pem"))
    assert config.pods[0].tls is not None
    assert config.pods[0].tls.key_file == str(tmp_path / "c.key")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("engineTls: {certFile: a.pem}", "$.engineTls.keyFile"),
        ("engineTls: {caFile: a.pem, verify: false}", "$.engineTls.caFile"),
        ('pods: [{name: p, url: "https://h:1", tls: {keyFile: a}}]', "$.pods[0].tls.keyFile"),
        ("admin: null\nadminTls: {certFile: a, keyFile: b}", "$.adminTls"),
        ("tls: {certFile: a}", "$.tls"),
    ],
)
def test_a_wrong_setting_fails_with_its_path(text: str, path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, base=Path("/"))
    assert caught.value.path.startswith(path)
