"""Tests every way to reach a server, and the errors if it cannot be reached."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from matrixinfer import config as configuration
from matrixinfer.config import Config, IndexConfig, RedisConfig, TlsConfig
from matrixinfer.errors import IndexUnavailable
from matrixinfer.index.redis.circuit import FAILURES, LONGEST_PAUSE_SECONDS
from matrixinfer.index.redis.index import RedisIndex
from matrixinfer.index.redis.reader import BlockReader
from matrixinfer.index.redis.store import Store
from tests.ports import free_port
from tests.servers import Server, debian_server, server
from tests.waiting import DEADLINE_SECONDS, eventually

from .redis_support import BLOCKS, Proxy, certificates, opened

pytestmark = pytest.mark.server

SECRET = "s3cret-of-the-server"
HASHES = list(range(1, 9))


async def works(config: RedisConfig) -> RedisIndex:
    """Write blocks and read them back. Returns the closed index."""
    async with opened(config) as index:
        index.add("llama", "pod-a", HASHES, None)
        index.add("llama", "pod-b", HASHES[:3], None)
        index.remove("llama", "pod-a", HASHES[6:])
        await index.flush()
        assert await index.match("llama", HASHES) == {"pod-a": 6, "pod-b": 3}
        assert index.reader.stats.outcomes["answered"] == 1
        return index


@pytest.fixture
def fresh(valkey: Server) -> Server:
    valkey.flush()
    return valkey


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a password, a user with all rights, and a user who may not run scripts."""
    with server(
        tmp_path_factory.mktemp("locked"),
        *("--requirepass", SECRET),
        *("--user", "writer", "on", f">{SECRET}", "~*", "&*", "+@all"),
        *("--user", "reader", "on", f">{SECRET}", "~*", "&*", "+@all", "-evalsha", "-eval", "-script"),
    ) as made:
        yield made


async def test_host_and_port(fresh: Server) -> None:
    await works(fresh.config())


async def test_host_port_and_password_from_the_environment(locked: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_HOST", "127.0.0.1")
    monkeypatch.setenv("REDIS_PORT", str(locked.port))
    monkeypatch.setenv("REDIS_PASSWORD", SECRET)
    found = configuration.checked(Config(index=IndexConfig(kind="redis"))).redis
    assert found is not None
    await works(msgspec.structs.replace(found, deadline_seconds=DEADLINE_SECONDS))


async def test_password(locked: Server) -> None:
    await works(locked.config(password=SECRET))


async def test_user_and_password(locked: Server) -> None:
    await works(locked.config(username="writer", password=SECRET))


async def test_a_user_without_scripts_reads_by_pipeline_what_others_wrote(locked: Server) -> None:
    async with (
        opened(locked.config(username="writer", password=SECRET)) as writer,
        opened(locked.config(username="reader", password=SECRET)) as reader,
    ):
        writer.add("qwen", "pod-a", HASHES, None)
        await writer.flush()
        with capture_logs() as logs:
            for count in (8, 5, 1):
                expected = await writer.match("qwen", HASHES[:count])
                assert await reader.match("qwen", HASHES[:count]) == expected == {"pod-a": count}
                assert await reader.last("qwen", ["pod-a"], HASHES[:count]) == {"pod-a": count - 1}
        assert [log["event"] for log in logs] == ["redis_scripts_refused"]
        assert reader.reader.circuit == "closed"


async def test_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with server(tmp_path / "server", "--unixsocket", str(path)) as made:
        await works(made.config(socket=str(path), host=None, port=None))


async def test_database(fresh: Server) -> None:
    await works(fresh.config(db=3))
    with fresh.client() as client:
        assert not client.dbsize()


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, object]:
    certificate, context = certificates(tmp_path_factory.mktemp("certificates"))
    return str(certificate), context


@pytest.fixture
async def tls(fresh: Server, signed: tuple[str, object]) -> AsyncIterator[Proxy]:
    async with Proxy(fresh.port, signed[1]) as proxy:  # type: ignore[arg-type]
        yield proxy


async def test_tls_with_a_trusted_certificate(fresh: Server, tls: Proxy, signed: tuple[str, object]) -> None:
    await works(fresh.config(host="localhost", port=tls.port, tls=TlsConfig(ca_file=signed[0])))
    assert tls.connections


@pytest.mark.parametrize("trusts", [False, True])
async def test_tls_is_refused_for_untrusted_certificates_and_other_names(
    fresh: Server, tls: Proxy, signed: tuple[str, object], trusts: bool
) -> None:
    config = fresh.config(
        port=tls.port, tls=TlsConfig(ca_file=signed[0] if trusts else None)
    )  # the certificate is for localhost, not for 127.0.0.1
    async with Store(config) as store:
        index = RedisIndex(store, BLOCKS, max_age=60)
        with pytest.raises(IndexUnavailable, match="certificate verify failed"):
            await index.match("llama", HASHES)


async def test_tls_without_verifying(fresh: Server, tls: Proxy) -> None:
    await works(fresh.config(port=tls.port, tls=TlsConfig(verify=False)))


async def test_debians_redis(tmp_path: Path) -> None:
    executable = debian_server()
    if executable is None:
        pytest.skip("no redis-server on the PATH")
    with server(tmp_path, executable=executable) as made:
        await works(made.config())
        made.flush()
        await works(made.config(scripts=False))


# Interruptions


async def test_scripts_that_the_server_forgot_are_loaded_again(fresh: Server) -> None:
    async with opened(fresh.config()) as index:
        for count in range(1, 4):
            index.add("llama", "pod-a", HASHES[:count], None)
            await index.flush()
            assert await index.match("llama", HASHES) == {"pod-a": count}
            with fresh.client() as client:
                client.script_flush()
        assert await index.match("llama", HASHES) == {"pod-a": 3}
        assert index.writer.stats.failures == 0


async def test_a_restarted_server_is_filled_again(tmp_path: Path) -> None:
    with server(tmp_path) as made:
        async with opened(made.config()) as index:
            index.add("llama", "pod-a", HASHES, None)
            await index.flush()
            made.kill()
            index.remove("llama", "pod-a", HASHES[5:])
            with pytest.raises(IndexUnavailable):
                await index.match("llama", HASHES)
            made.start()
            await index.flush()
            assert await index.match("llama", HASHES) == {"pod-a": 5}
            assert index.writer.stats.resyncs == 2


async def test_a_frozen_server_is_late_and_its_late_answers_are_ignored(tmp_path: Path) -> None:
    with server(tmp_path) as made:
        async with opened(made.config(connections=2)) as index:
            index.add("llama", "pod-a", HASHES, None)
            index.add("qwen", "pod-b", HASHES[:2], None)
            await index.flush()
            now = 0.0
            async with Store(made.config(connections=2, deadline_seconds=0.05)) as store:
                hasty = BlockReader(store, max_age=60, monotonic=lambda: now)
                made.freeze()
                late = await asyncio.gather(*(hasty.match("llama", HASHES) for _ in range(9)), return_exceptions=True)
                assert all(isinstance(error, IndexUnavailable) for error in late)
                assert hasty.stats.outcomes["late"] == 9
                with pytest.raises(IndexUnavailable, match="not asked"):
                    await hasty.match("llama", HASHES)
                made.thaw()
                assert await index.match("qwen", HASHES) == {"pod-b": 2}
                async with asyncio.timeout(DEADLINE_SECONDS):
                    while hasty.circuit != "closed":
                        now += LONGEST_PAUSE_SECONDS
                        await asyncio.gather(hasty.match("llama", HASHES), return_exceptions=True)
            async with Store(made.config(connections=2)) as store:
                patient = BlockReader(store, max_age=60)
                made.freeze()
                given_up = [asyncio.create_task(patient.match("llama", HASHES)) for _ in range(4)]
                await asyncio.sleep(0.05)
                for task in given_up:
                    task.cancel()
                await asyncio.gather(*given_up, return_exceptions=True)
                made.thaw()
                for _ in range(3):
                    assert await patient.match("qwen", HASHES) == {"pod-b": 2}
                    assert await patient.match("llama", HASHES) == {"pod-a": 8}


async def test_last_has_the_deadline_the_circuit_and_the_counters_of_match(tmp_path: Path) -> None:
    with server(tmp_path) as made:
        async with opened(made.config()) as index:
            index.add("llama", "pod-a~ends", HASHES, None)
            await index.flush()
        async with Store(made.config(connections=2, deadline_seconds=0.05)) as store:
            hasty = BlockReader(store, max_age=60, monotonic=lambda: 0.0)
            assert await hasty.last("llama", [], HASHES) == await hasty.last("llama", ["pod-a~ends"], []) == {}
            made.freeze()
            for _ in range(FAILURES):
                with pytest.raises(IndexUnavailable, match="no answer from"):
                    await hasty.last("llama", ["pod-a~ends"], HASHES)
            with pytest.raises(IndexUnavailable, match="not asked"):
                await hasty.last("llama", ["pod-a~ends"], HASHES)
            with pytest.raises(IndexUnavailable, match="not asked"):
                await hasty.match("llama", HASHES)
            assert hasty.stats.outcomes == {"answered": 0, "capped": 0, "late": FAILURES, "failed": 0, "refused": 2}
            made.thaw()
        async with Store(made.config()) as store:
            patient = BlockReader(store, max_age=60)
            assert await patient.last("llama", ["pod-a~ends"], HASHES) == {"pod-a~ends": 7}
            assert patient.stats.outcomes["answered"] == 1


async def test_an_abandoned_write_that_arrives_late_changes_nothing(
    fresh: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matrixinfer.index.redis.store.REPLY_SECONDS", 1.0)
    async with (
        Proxy(fresh.port) as proxy,
        opened(fresh.config(port=proxy.port)) as index,
        opened(fresh.config()) as eye,
    ):
        index.add("llama", "pod-a", HASHES, None)
        await index.flush()
        proxy.hold()
        index.remove("llama", "pod-a", HASHES[5:])
        await eventually(lambda: index.writer.stats.failures > 0)
        proxy.pass_on()
        index.add("llama", "pod-a", HASHES[5:7], None)
        await index.flush()
        assert await eye.match("llama", HASHES) == {"pod-a": 7}
        proxy.deliver()
        await proxy.settled()
        assert index.writer.stats.resyncs == 1  # at the start
        assert await eye.match("llama", HASHES) == {"pod-a": 7}


# Messages


@pytest.mark.parametrize("username", [None, "writer", "nobody"])
async def test_the_password_is_never_revealed(
    locked: Server, username: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = SECRET + "-of-yore"
    config = locked.config(username=username, password=wrong)
    async with opened(config) as index:
        index.add("llama", "pod-a", HASHES, None)
        with capture_logs() as logs, pytest.raises(IndexUnavailable) as caught:
            await index.match("llama", HASHES)
        await eventually(lambda: index.writer.stats.failures > 0)
        texts = [
            repr(config),
            str(config),
            repr(Config(redis=config)),
            str(caught.value),
            repr(caught.value),
            repr(logs),
        ]
    async with Store(config) as store:
        texts += [repr(store), repr(store.client), repr(store.client.connection_pool)]  # type: ignore[union-attr]
    texts += [*traceback.format_exception(caught.value), *capfd.readouterr()]
    assert "invalid username-password pair" in str(caught.value)
    for text in texts:
        assert SECRET not in text
    with pytest.raises(IndexUnavailable, match="uthentication"):
        async with Store(locked.config()) as store:
            await RedisIndex(store, BLOCKS, max_age=60).match("llama", HASHES)


async def test_a_server_that_does_not_listen() -> None:
    nowhere = RedisConfig(host="127.0.0.1", port=free_port(), password=SECRET, deadline_seconds=DEADLINE_SECONDS)
    async with Store(nowhere) as store:
        with pytest.raises(IndexUnavailable) as caught:
            await RedisIndex(store, BLOCKS, max_age=60).match("llama", HASHES)
    assert str(nowhere.port) in str(caught.value)
    assert SECRET not in str(caught.value)
