"""`matrixinfer index` against a real server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from matrixinfer.cli import main
from matrixinfer.index.redis import layout
from matrixinfer.index.redis.pod_states import PodState, encode
from matrixinfer.index.redis.reader import BlockReader
from matrixinfer.index.redis.store import Store
from matrixinfer.index.redis.writer import BlockWriter
from tests import servers
from tests.ports import free_port
from tests.waiting import eventually, wait_until

pytestmark = pytest.mark.server

META = {"block_size": "128", "hash_scheme": "prefix", "version": "1"}
DAY = 86_400.0
Ask = Callable[..., Any]


@pytest.fixture
def ask(valkey: servers.Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Ask:
    """Runs `matrixinfer index` and returns what it prints, parsed if it is JSON."""
    valkey.flush()
    monkeypatch.setenv("REDIS_HOST", "127.0.0.1")
    monkeypatch.setenv("REDIS_PORT", str(valkey.port))

    def run(*arguments: str, exit_code: int = 0) -> Any:
        capfd.readouterr()
        assert main(["index", *arguments]) == exit_code
        out, err = capfd.readouterr()
        assert not (err if exit_code < 2 else out)
        return json.loads(out) if "--json" in arguments else out + err

    return run


def write(server: servers.Server, model: str, pod: str, blocks: range | list[int], at: float | None = None) -> None:
    """Write entries as a writer of another project does."""
    with server.client() as client:
        for block in blocks:
            client.hset(f"{layout.prefix_of(model)}{block}", pod, str(int(time.time() if at is None else at)))


def test_stats_count_valid_and_stale_blocks_by_model_and_pod(valkey: servers.Server, ask: Ask) -> None:
    write(valkey, "qwen", "a", range(600))
    write(valkey, "qwen", "b.svc.cluster.local", range(100))
    write(valkey, "llama", "b", range(7), at=time.time() - 2 * DAY)
    with valkey.client() as client:
        client.hset(layout.meta_key("qwen"), mapping=META)
        client.hset(layout.EPOCHS, "b", str(int(time.time()) - 60))
        client.hset(layout.STATES, "b", encode(PodState(trust="exact", feed="complete", model="qwen")))
        client.set("unrelated", "1")
    found = ask("stats", "--json")
    assert found["complete"]
    assert found["keys"] == 600 + 7 + 4
    qwen, llama = found["models"]["qwen"], found["models"]["llama"]
    assert (qwen["blocks"], qwen["entries"], qwen["stale"]) == (600, 700, 0)
    assert qwen["pods"] == {"a": 600, "b": 100}
    assert qwen["scheme"] == META
    assert 50 < qwen["bytes_per_block"] < 500
    assert (llama["blocks"], llama["entries"], llama["stale"], llama["pods"]) == (7, 0, 7, {})
    assert (found["pods"]["b"]["alive"], found["pods"]["b"]["state"]["trust"]) == (False, "exact")
    table = ask("stats")
    assert "qwen" in table
    assert "--limit" not in table
    for column in ("block_size", "hash_scheme", "bytes_per_block", "lease_seconds", "last_stamp"):
        assert column in table


def test_stats_say_that_the_scan_was_limited(valkey: servers.Server, ask: Ask) -> None:
    write(valkey, "qwen", "a", range(3_000))
    found = ask("stats", "--limit", "1000", "--json")
    assert not found["complete"]
    assert 0 < found["models"]["qwen"]["blocks"] < 3_000
    assert "Only about 1,000 keys were scanned: more blocks exist. Use --limit to scan more." in ask(
        "stats", "--limit", "1000"
    )


def test_stats_of_an_empty_server(ask: Ask) -> None:
    assert ask("stats", "--json")["models"] == {}
    assert " 0 keys" in ask("stats")


def test_a_block_is_shown_with_its_holders_and_why_entries_are_invalid(valkey: servers.Server, ask: Ask) -> None:
    now = time.time()
    write(valkey, "qwen", "young", [5])
    write(valkey, "qwen", "old", [5], at=now - 2 * DAY)
    write(valkey, "qwen", "cleared", [5], at=now - 60)
    with valkey.client() as client:
        client.hset(layout.EPOCHS, "cleared", str(int(now)))
    holders = ask("show", "qwen", "5", "--json")["holders"]
    assert {pod: holder["valid"] for pod, holder in holders.items()} == {"young": True, "old": False, "cleared": False}
    table = ask("show", "qwen", "5")
    assert "too old, and the pod has no live writer" in table
    assert f"stamped before the pod's epoch {int(now)}" in table
    with valkey.client() as client:
        client.hset(layout.LEASES, "old", str(int(now) + 15))
    assert ask("show", "qwen", "5", "--json")["holders"]["old"]["valid"]
    assert "no pod holds this block" in ask("show", "qwen", "6", exit_code=1)


def test_a_pod_is_shown_with_its_ranks_and_tiers(valkey: servers.Server, ask: Ask) -> None:
    for pod in ("a", "a@dp0", "a~device", "a-2"):
        write(valkey, "qwen", pod, range(10))
    with valkey.client() as client:
        client.hset(layout.TOKENS, "a@dp0", "3")
        client.hset(layout.STATES, "a@dp0", "no JSON")
    assert list(ask("show", "--pod", "a", "--json")["pods"]) == ["a", "a@dp0", "a~device"]
    shown = ask("show", "--pod", "a")
    assert "a: holds 10 of 10 blocks" in shown
    assert "token 3" in shown
    assert "no writer has ever written for it" in ask("show", "--pod", "nobody", exit_code=1)


@pytest.mark.parametrize("arguments", [(), ("qwen",), ("qwen", "x"), ("qwen", "5", "--pod", "a")])
def test_show_needs_either_a_block_or_a_pod(arguments: tuple[str, ...], ask: Ask) -> None:
    ask("show", *arguments, exit_code=2)


def test_a_pod_without_a_writer_is_purged(valkey: servers.Server, ask: Ask) -> None:
    write(valkey, "qwen", "a", range(10))
    write(valkey, "qwen", "b", range(10))
    assert "expected --yes" in ask("purge", "--pod", "a", exit_code=2)
    assert "would be invalid" in ask("purge", "--pod", "a", "--dry-run")
    assert ask("stats", "--json")["models"]["qwen"]["pods"] == {"a": 10, "b": 10}
    purged = ask("purge", "--pod", "a.svc.cluster.local", "--yes", "--json")
    assert purged["live_writers"] == []
    assert purged["epochs"]["a"] > int(time.time())
    assert ask("stats", "--json")["models"]["qwen"]["pods"] == {"b": 10}


async def test_ends_are_no_pods_and_are_shown_and_purged_with_their_pod(valkey: servers.Server, ask: Ask) -> None:
    async with Store(valkey.config()) as store, BlockWriter(store, meta=META, max_age=DAY) as writer:
        for pod, blocks in (("a", range(10)), ("a~ends", [3, 100, 101]), ("a@dp1~ends", [102]), ("b", range(2))):
            writer.add("qwen", pod, list(blocks))
        await writer.flush()
    qwen = (await asyncio.to_thread(ask, "stats", "--json"))["models"]["qwen"]
    assert (qwen["blocks"], qwen["entries"], qwen["stale"]) == (10, 12, 0)
    assert (qwen["pods"], qwen["ends"]) == ({"a": 10, "b": 2}, {"a~ends": 3, "a@dp1~ends": 1})
    table = (await asyncio.to_thread(ask, "stats")).splitlines()
    row = dict(zip(table[1].split(), table[2].split(), strict=False))
    assert (row["pods"], row["ends"]) == ("2", "4")
    shown = await asyncio.to_thread(ask, "show", "--pod", "a", "--json")
    assert {name: pod["blocks"] for name, pod in shown["pods"].items()} == {"a": 10, "a~ends": 3, "a@dp1~ends": 1}
    assert "a~ends: 3 marks of ends\n" in await asyncio.to_thread(ask, "show", "--pod", "a")
    purged = await asyncio.to_thread(ask, "purge", "--pod", "a", "--yes", "--json")
    assert sorted(purged["pods"]) == ["a", "a@dp1~ends", "a~ends"]
    qwen = (await asyncio.to_thread(ask, "stats", "--json"))["models"]["qwen"]
    assert (qwen["pods"], qwen["ends"], qwen["stale"]) == ({"b": 2}, {}, 14)


def test_a_model_is_purged_and_no_other(valkey: servers.Server, ask: Ask) -> None:
    for model in ("qwen", "qwen@v2", "q*"):
        write(valkey, model, "a", range(1_200))
    with valkey.client() as client:
        client.hset(layout.meta_key("q*"), mapping=META)
    assert "1,200 blocks would be deleted" in ask("purge", "--model", "q*", "--dry-run")
    assert ask("purge", "--model", "q*", "--yes", "--json")["blocks"] == 1_200
    assert "qwen: 1,200 blocks were deleted" in ask("purge", "--model", "qwen", "--yes")
    assert list(ask("stats", "--json")["models"]) == ["qwen@v2"]
    with valkey.client() as client:
        assert client.dbsize() == 1_200


@pytest.mark.parametrize("what", [("--pod", "a"), ("--model", "qwen")])
async def test_a_live_writer_writes_again_what_was_purged(
    what: tuple[str, str], valkey: servers.Server, ask: Ask
) -> None:
    async with Store(valkey.config()) as store, BlockWriter(store, meta=META, max_age=DAY) as writer:
        writer.add("qwen", "a", list(range(10)))
        await writer.flush()
        purged = await asyncio.to_thread(ask, "purge", *what, "--yes", "--json")
        assert purged["live_writers"] == ["a"]
        reader = BlockReader(store, max_age=DAY)
        assert await reader.match("qwen", list(range(11))) == {}
        writer.add("qwen", "a", [10])  # it notices the purge with its next write or heartbeat

        async def is_whole() -> bool:
            return await reader.match("qwen", list(range(11))) == {"a": 11}

        await eventually(is_whole)
        stats = await asyncio.to_thread(ask, "stats", "--json")
        assert stats["models"]["qwen"]["scheme"] == META
        assert stats["pods"]["a"]["alive"]


@pytest.mark.parametrize(
    "arguments", [("stats",), ("show", "qwen", "1"), ("show", "--pod", "a"), ("purge", "--pod", "a", "--yes")]
)
def test_a_server_that_is_down_is_reported_in_one_line_without_the_password(
    arguments: tuple[str, ...], tmp_path: Path, ask: Ask
) -> None:
    port = free_port()
    config = tmp_path / "gateway.yaml"
    config.write_text(f"redis: {{port: {port}, password: hunter2, username: me}}")
    message = ask(*arguments, "--config", str(config), exit_code=2)
    assert message.startswith(f"matrixinfer: Redis at 127.0.0.1:{port} does not answer: ")
    assert message.count("\n") == 1
    assert "hunter2" not in message


def test_every_command_works_on_a_cluster(tmp_path: Path, ask: Ask) -> None:
    with servers.server(tmp_path / "server", *servers.cluster_options()) as server:
        with server.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            wait_until(lambda: "cluster_state:ok" in str(client.execute_command("CLUSTER", "INFO")))
        write(server, "qwen", "a", range(700))
        config = tmp_path / "gateway.yaml"
        config.write_text(f"redis: {{port: {server.port}, cluster: true}}")
        where = ("--config", str(config))
        stats = ask("stats", "--json", *where)
        assert stats["server"].startswith("valkey ")
        assert stats["used_bytes"] > 0
        assert stats["models"]["qwen"]["pods"] == {"a": 700}
        assert ask("show", "--pod", "a", "--json", *where)["pods"]["a"]["blocks"] == 700
        ask("purge", "--pod", "a", "--yes", *where)
        assert ask("stats", "--json", *where)["models"]["qwen"]["stale"] == 700
        assert ask("purge", "--model", "qwen", "--yes", "--json", *where)["blocks"] == 700
        assert ask("stats", "--json", *where)["models"] == {}


def test_names_cannot_format_or_forge_the_output(valkey: servers.Server, ask: Ask) -> None:
    for name in ("[/y]", "g[l]o*", "two\nlines", "\x1b[31mred"):
        valkey.flush()
        write(valkey, name, f"pod-{name}", [5])
        with valkey.client() as client:
            client.hset(layout.TOKENS, f"pod-{name}", "1")
        shown = name.encode("unicode_escape").decode()
        for words in (
            ("stats",),
            ("show", name, "5"),
            ("show", "--pod", f"pod-{name}"),
            ("purge", "--pod", f"pod-{name}", "--dry-run"),
            ("purge", "--model", name, "--dry-run"),
        ):
            out = ask(*words)
            assert shown in out
            assert all(line.isprintable() for line in out.splitlines()), out
            assert len(out.splitlines()) <= 5


def test_a_stamp_that_cannot_be_read_is_shown_as_missing(valkey: servers.Server, ask: Ask) -> None:
    with valkey.client() as client:
        client.hset(f"{layout.prefix_of('m')}5", mapping={"theirs": "soon", "ours": "soon"})
        client.hset(layout.EPOCHS, "ours", "7")
    holders = ask("show", "m", "5", "--json")["holders"]
    assert holders["theirs"] == {"stamp": None, "valid": True, "reason": None}
    assert holders["ours"] == {"stamp": None, "valid": False, "reason": "its stamp cannot be read"}
    assert "its stamp cannot be read" in ask("show", "m", "5")


def test_a_key_of_another_type_is_no_block(valkey: servers.Server, ask: Ask) -> None:
    with valkey.client() as client:
        client.set(f"{layout.prefix_of('m')}5", "x")
    assert "holds something else than a hash" in ask("show", "m", "5", exit_code=1)
