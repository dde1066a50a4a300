"""`matrixinfer events tail` and `record` against real ZMQ publishers."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from matrixinfer.cli import events, main
from matrixinfer.cli.events import record, tail
from matrixinfer.errors import ConfigError
from matrixinfer.feedtools import listen
from matrixinfer.feedtools.capture import CaptureReport, check_capture
from matrixinfer.feedtools.capture_file import CaptureReader
from matrixinfer.feedtools.listen import CannotListen
from matrixinfer.kvevents import connect
from matrixinfer.sim.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch, encode
from matrixinfer.sim.publisher import EventPublisher
from tests.ports import two_ports
from tests.waiting import DEADLINE_SECONDS, eventually

from .kvevents_support import Relay

NOON = 1_750_000_000 // 86_400 * 86_400 + 12 * 3600
HASH = 0x1F2E33A0_00000000
SECRET = 77_001
"""The first token id of every prompt in these tests."""


def stored(first: int, last: int, *, salt: str | None = None) -> BlockStored:
    """Blocks [first, last) of 16 tokens of one prompt, named by their position."""
    extra: list[tuple[str | tuple[str, int], ...] | None] = [None] * (last - first)
    if salt is not None:
        extra[0] = (salt,)
    return BlockStored(
        block_hashes=[HASH + block for block in range(first, last)],
        parent_block_hash=HASH + first - 1 if first else None,
        token_ids=list(range(SECRET + first * 16, SECRET + last * 16)),
        block_size=16,
        extra_keys=extra,
    )


def removed(*blocks: int) -> BlockRemoved:
    return BlockRemoved(block_hashes=[HASH + block for block in blocks])


EXAMPLE: list[list[Event]] = [
    [stored(0, 3, salt="hush")],
    [stored(3, 4), removed(3)],
    [AllBlocksCleared()],
    [stored(0, 1)],
]
"""The batches behind the examples of the documentation."""


class Engine:
    """A publisher that answers replays."""

    def __init__(self, ports: tuple[int, int] = (0, 0)) -> None:
        self._publisher = EventPublisher("127.0.0.1", port=ports[0], replay_port=ports[1], topic="kv")

    async def __aenter__(self) -> Engine:
        await self._publisher.__aenter__()
        self._task = asyncio.create_task(self._publisher.serve())
        self.endpoint, self.replay = self._publisher.endpoint, self._publisher.replay_endpoint
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        await self._publisher.__aexit__(None, None, None)

    @property
    def ports(self) -> tuple[int, int]:
        return int(self.endpoint.rpartition(":")[2]), int(self.replay.rpartition(":")[2])

    def publish(self, *events: Event) -> None:
        """Publish a batch. Batch n has the time n.5 seconds after noon."""
        self._publisher.publish(encode(EventBatch(NOON + self._publisher.published + 0.5, list(events))))

    def publish_bytes(self, payload: bytes) -> None:
        self._publisher.publish(payload)

    def send(self, *parts: bytes) -> None:
        self._publisher.send_raw(*parts)

    def skip(self, frames: int) -> None:
        """Continue as if this many frames had been published and were gone from the replay buffer."""
        self._publisher.skip(frames)


class Running:
    """A command that runs in this process, and its output so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self._out = self._err = ""

    async def start(self, command: Callable[[argparse.Namespace], Coroutine[Any, Any, None]], *words: object) -> None:
        parser = argparse.ArgumentParser()
        events.add_parser(parser.add_subparsers())
        self._task = asyncio.create_task(command(parser.parse_args(["events", *map(str, words)])))

    @property
    def out(self) -> list[str]:
        self._read()
        return self._out.splitlines()

    @property
    def err(self) -> str:
        self._read()
        return self._err

    async def wait_for(self, words: str, times: int = 1) -> None:

        def has_printed() -> bool:
            self._read()
            if (self._out + self._err).count(words) >= times:
                return True
            assert not self._task.done(), self._out + self._err
            return False

        await eventually(has_printed)

    async def end(self) -> list[str]:
        """Wait until it ends by itself, and return its output."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            await self._task
        return self.out

    async def stop(self) -> list[str]:
        """Send Ctrl-C, then wait as `end` does."""
        os.kill(os.getpid(), signal.SIGINT)
        return await self.end()

    async def cancel(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    def _read(self) -> None:
        out, err = self._capsys.readouterr()
        self._out += out
        self._err += err


@pytest.fixture
async def running(capsys: pytest.CaptureFixture[str]) -> AsyncIterator[Running]:
    running = Running(capsys)
    yield running
    await running.cancel()


# Tail


async def test_tail_shows_past_events_and_then_live_ones(running: Running) -> None:
    async with Engine() as engine:
        for batch in EXAMPLE[:2]:
            engine.publish(*batch)
        await running.start(tail.tail, "tail", engine.endpoint, "--replay", engine.replay)
        await running.wait_for("#1", times=2)
        await running.wait_for("connected")
        for batch in EXAMPLE[2:]:
            engine.publish(*batch)
        await running.wait_for("#3")
        assert await running.stop() == [
            "#0 12:00:00.500  stored 3 blocks of 16 tokens at the start of a prompt, on GPU, with extra keys (salt or media)",
            "#1 12:00:01.500  stored 1 block of 16 tokens after 1f2e33a0…, on GPU",
            "#1 12:00:01.500  removed 1 block, from GPU",
            "#2 12:00:02.500  cleared everything",
            "#3 12:00:03.500  stored 1 block of 16 tokens at the start of a prompt, on GPU",
            f"{engine.endpoint}: 4 frames, 5 events; 1 block of 16 tokens held now",
            "  on GPU; group 0; salts visible",
        ]
    assert "hush" not in "".join(running.out)
    assert str(SECRET)[:4] not in "".join(running.out)


async def test_tail_without_a_replay_says_what_it_missed(running: Running) -> None:
    async with Engine() as engine:
        engine.publish(stored(0, 1))
        await running.start(tail.tail, "tail", engine.endpoint, "--topic", "kv", "--count", 3)
        await running.wait_for("connected")
        engine.publish(stored(1, 2))
        engine.skip(3)
        engine.publish(stored(0, 2))
        engine.publish_bytes(b"\xc1")
        engine.send(b"a message", b"of two parts")
        engine.send(b"other", bytes(8), b"")
        engine.skip(1)
        engine.publish(removed(1))
        lines = [line.removeprefix("#").partition("  ")[2] or line for line in await running.end()]
        assert lines[:-3] == [
            "the first frame seen: blocks stored before it are unknown",
            "stored 1 block of 16 tokens after 1f2e33a0…, on GPU (ignored, its parent was never seen)",
            "frames 2 to 4 are missing: the blocks held are unknown",
            "stored 2 blocks of 16 tokens at the start of a prompt, on GPU",
            "unreadable frame of 1 byte",
            "a message of 2 parts that is not a frame (sizes 9 and 12)",
            "another topic: `other` (shown once)",
            "frame 7 is missing: the blocks held are unknown",
            "removed 1 block, from GPU (never seen)",
        ]
        assert lines[-3].endswith("4 frames, 3 events; 0 blocks of 16 tokens held now")
        assert lines[-1].endswith(
            "2 gaps; 4 missing frames; 1 orphan block; 1 unreadable frame; 1 wrong frame; 1 other-topic frame"
        )


async def test_tail_prints_objects_and_the_first_tokens_where_asked(running: Running) -> None:
    async with Engine() as engine:
        engine.publish(stored(0, 1), removed(0))
        args = ("tail", engine.endpoint, "--replay", engine.replay, "--json", "--tokens", "--count", 2)
        await running.start(tail.tail, *args)
        first, second, last = map(json.loads, await running.end())
        at = {"publisher": engine.endpoint, "seq": 0, "time": NOON + 0.5}
        where = {"medium": "GPU", "group": 0}
        name = f"{HASH:016x}"
        assert first == {
            **at,
            **where,
            "kind": "stored",
            "blocks": [name],
            "parent": None,
            "block_size": 16,
            "adapter": None,
            "extra_keys": False,
            "first_tokens": list(range(SECRET, SECRET + 8)),
        }
        assert second == {**at, **where, "kind": "removed", "blocks": [name]}
        assert (last["kind"], last["frames"], last["events"], last["blocks"]) == ("summary", 1, 2, 0)


async def test_tail_detects_a_restart_that_sequence_numbers_do_not_show(running: Running) -> None:
    async with Engine(two_ports()) as engine:
        engine.publish(stored(0, 4))
        await running.start(tail.tail, "tail", engine.endpoint, "--replay", engine.replay)
        await running.wait_for("#0")
        await running.wait_for("connected")
    await running.wait_for("connection lost")
    async with Engine(engine.ports) as engine:
        engine.publish(stored(0, 1, salt="new"))
        engine.publish(stored(1, 2))
        await running.wait_for("connected", times=2)
        engine.publish(stored(2, 3))
        await running.wait_for("#2")
        lines = await running.stop()
    assert [line.partition("  ")[2] for line in lines[1:-3]] == [
        "the engine has restarted: nothing is held",
        "stored 1 block of 16 tokens at the start of a prompt, on GPU, with extra keys (salt or media)",
        "stored 1 block of 16 tokens after 1f2e33a0…, on GPU",
        "stored 1 block of 16 tokens after 1f2e33a0…, on GPU",
    ]
    assert lines[-1] == "  1 restart"


async def test_tail_says_what_to_check_when_no_events_arrive(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "IDLE_SECONDS", 0.1)
    ports = two_ports()
    endpoint = f"tcp://127.0.0.1:{ports[0]}"
    await running.start(tail.tail, "tail", endpoint)
    await running.wait_for(f"waiting: cannot connect to {endpoint} yet")
    async with Engine(ports):
        await running.wait_for("waiting: connected, but no new events")
        await asyncio.sleep(0.3)
        assert running.err.count("waiting") == 2
        assert (await running.stop())[-1].endswith("0 frames, 0 events; 0 blocks held now")


async def test_tail_replaces_a_dead_connection(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "HEARTBEAT_MS", 50)
    monkeypatch.setattr(connect, "HEARTBEAT_TIMEOUT_MS", 200)
    async with Engine() as engine, Relay(engine.ports[0]) as relay:
        await running.start(tail.tail, "tail", relay.endpoint, "--count", 1)
        await running.wait_for("connected")
        relay.go_silent()
        await running.wait_for("connection lost")
        await running.wait_for("connected", times=2)
        engine.publish(stored(0, 1))
        assert "stored 1 block" in (await running.end())[0]


async def test_tail_waits_for_a_name_to_resolve(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    lookup = loop.getaddrinfo

    async def unknown(*_: object, **__: object) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(listen, "LOOKUP_PAUSE", 0.05)
    monkeypatch.setattr(loop, "getaddrinfo", unknown)
    async with Engine() as engine:
        await running.start(tail.tail, "tail", engine.endpoint.replace("127.0.0.1", "localhost"))
        await running.wait_for("the name `localhost` does not resolve yet")
        await asyncio.sleep(0.2)
        monkeypatch.setattr(loop, "getaddrinfo", lookup)
        await running.wait_for("connected")
        assert running.err.count("resolve") == 1
        await running.stop()


async def test_tail_ends_after_the_given_seconds(running: Running) -> None:
    async with Engine() as engine:
        await running.start(tail.tail, "tail", engine.endpoint, "--seconds", 0.1)
        assert len(await running.end()) == 1


@asynccontextmanager
async def reporting(sources: object) -> AsyncIterator[str]:
    """The URL of an engine whose `/kv_event_sources` answers `sources`."""

    async def answer(_: web.Request) -> web.Response:
        return web.json_response(sources)

    app = web.Application()
    app.router.add_get("/kv_event_sources", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_tail_follows_every_rank_that_an_engine_reports_as_the_guide_shows(running: Running) -> None:
    async with Engine() as one, Engine() as two:
        ranks = {
            rank: {"endpoint": f"tcp://*:{engine.ports[0]}", "replay_endpoint": f"tcp://*:{engine.ports[1]}"}
            for rank, engine in (("0", one), ("1", two))
        }
        one.publish(stored(0, 3))
        two.publish(stored(0, 1))
        async with reporting(ranks) as url:
            guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
            (words,) = re.findall(r"^matrixinfer events (.*)$", guide, flags=re.MULTILINE)
            words = words.replace("http://10.0.0.1:8001", f"{url}/")
            await running.start(tail.tail, *words.split(), "--count", 2)
            lines = await running.end()
        assert {f"{one.endpoint}  #0 12:00:00.500", f"{two.endpoint}  #0 12:00:00.500"} == {
            line.rpartition("  stored")[0] for line in lines[:2]
        }
        assert f"{one.endpoint}: 1 frame, 1 event; 3 blocks of 16 tokens held now" in lines
        assert f"{two.endpoint}: 1 frame, 1 event; 1 block of 16 tokens held now" in lines


async def test_an_engine_that_reports_no_publisher_ends_the_command(running: Running) -> None:
    async with reporting({}) as url:
        await running.start(tail.tail, "tail", url)
        with pytest.raises(ConfigError, match="names no publisher"):
            await running.end()
    await running.start(tail.tail, "tail", url)
    with pytest.raises(ConfigError, match="ENDPOINT"):
        await running.end()


async def test_an_endpoint_that_zmq_rejects_ends_the_command(running: Running) -> None:
    await running.start(tail.tail, "tail", f"ipc:///{'long/' * 100}")
    with pytest.raises(CannotListen, match="long/"):
        await running.end()


# Record


def checked(file: Path) -> tuple[CaptureReport, bool]:
    reader = CaptureReader(file)
    return check_capture(reader), reader.cut


@pytest.mark.parametrize("name", ["recording.jsonl", "recording.jsonl.gz"])
async def test_a_recording_can_be_checked(running: Running, tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    async with Engine() as engine:
        engine.publish(stored(0, 3))
        args = ("record", engine.endpoint, "--replay", engine.replay, "-o", file, "--count", 2)
        await running.start(record.record, *args)
        await running.wait_for("connected")
        engine.publish(stored(3, 4), removed(2))
        assert await running.end() == []
    report, cut = checked(file)
    (publisher,) = report.publishers
    assert (report.frames, report.events, report.requests, cut) == (2, 3, 0, False)
    assert (publisher.name, publisher.blocks, publisher.orphans, report.unreadable) == ("", 3, 0, 0)
    assert "2 frames, " in running.err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


async def test_publishers_are_recorded_separately_and_other_topics_skipped(running: Running, tmp_path: Path) -> None:
    file = tmp_path / "recording.jsonl"
    async with Engine() as one, Engine() as two:
        args = ("record", one.endpoint, two.endpoint, "-o", file, "--topic", "kv", "--count", 2)
        await running.start(record.record, *args)
        await running.wait_for("connected", times=2)
        one.send(b"other", bytes(8), b"")
        one.send(b"not a frame")
        one.publish(stored(0, 3))
        two.publish(stored(0, 2))
        await running.end()
    blocks = {publisher.name: publisher.blocks for publisher in checked(file)[0].publishers}
    assert blocks == {one.endpoint: 3, two.endpoint: 2}
    assert "2 messages skipped" in running.err


async def test_a_publisher_that_is_named_twice_is_refused(running: Running, tmp_path: Path) -> None:
    endpoint = "tcp://127.0.0.1:1"
    await running.start(record.record, "record", endpoint, endpoint, "-o", tmp_path / "x")
    with pytest.raises(ConfigError, match="twice"):
        await running.end()


# As processes


@asynccontextmanager
async def process(*words: object) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "matrixinfer", "events", *map(str, words)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.parametrize("name", ["recording.jsonl", "recording.jsonl.gz"])
@pytest.mark.parametrize("last", [signal.SIGKILL, signal.SIGTERM])
async def test_a_recording_that_is_ended_by_a_signal_can_be_checked(
    tmp_path: Path, name: str, last: signal.Signals
) -> None:
    file = tmp_path / name
    async with Engine() as engine:
        for block in range(40):
            engine.publish(stored(block, block + 1))
        async with process("record", engine.endpoint, "--replay", engine.replay, "-o", file) as recorder:
            await eventually(lambda: file.exists() and len(list(CaptureReader(file))) >= 41, pause=0.05)
            recorder.send_signal(last)
            assert await recorder.wait() == (0 if last is signal.SIGTERM else -last)
    report, cut = checked(file)
    assert (report.frames, report.publishers[0].blocks) == (40, 40)
    assert cut == (last is signal.SIGKILL and name.endswith(".gz"))


async def test_tail_ends_quietly_when_its_pipe_is_closed() -> None:
    async with Engine() as engine:
        engine.publish(stored(0, 1))
        async with process("tail", engine.endpoint, "--replay", engine.replay) as tail:
            assert tail.stdout is not None
            assert tail.stderr is not None
            assert (await tail.stdout.readline()).startswith(b"#0")
            tail.stdout._transport.close()  # type: ignore[attr-defined]  # noqa: SLF001 - no public way
            while tail.returncode is None:
                engine.publish(AllBlocksCleared())
                await asyncio.sleep(0.05)
            assert tail.returncode == 0
            assert b"Traceback" not in await tail.stderr.read()


@pytest.mark.parametrize("words", [["check", *["tests/data/captures/capture.jsonl.gz"] * 3], ["check", "--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
async def test_a_command_ends_quietly_when_its_pipe_is_closed(words: list[str], unbuffered: str) -> None:
    out, into = os.pipe()
    os.close(out)
    command = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "matrixinfer", "events", *words),
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        cwd=Path(__file__).parents[2],
        stdout=into,
        stderr=asyncio.subprocess.PIPE,
    )
    os.close(into)
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert (await command.communicate())[1] == b""
    assert command.returncode == 0


# The documentation


async def test_the_operations_page_shows_the_real_output(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    commands = {"tail": tail.tail, "record": record.record}
    async with Engine() as engine:
        for batch in EXAMPLE:
            engine.publish(*batch)
        names = {
            "tcp://10.0.0.1:5557": engine.endpoint,
            "tcp://10.0.0.1:5558": engine.replay,
            "feed.jsonl.gz": str(tmp_path / "feed.jsonl.gz"),
        }
        page = (root / "docs" / "troubleshooting.md").read_text()
        for shown, real in names.items():
            page = page.replace(shown, real)
        examples = [
            example
            for block in re.findall(r"```console\n(.*?)```", page, flags=re.DOTALL)
            for example in re.findall(r"\$ matrixinfer events (.*?)\n((?:[^$].*\n)*)", block)
        ]
        for words, expected in examples:
            if words.startswith("check"):
                assert main(["events", *words.split()]) == 0
                assert capsys.readouterr().out == expected
            else:
                running = Running(capsys)
                await running.start(commands[words.split()[0]], *words.split())
                assert await running.end() == expected.splitlines()
    assert len(examples) == 4
