"""Lines of the access log: what is in them, where they go, and what happens when they cannot go there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from matrixinfer.config import AccessLogConfig, parse
from matrixinfer.errors import ConfigError
from matrixinfer.telemetry.access_entry import AccessEntry, WrittenBlocks, text_line
from matrixinfer.telemetry.access_log import AccessLog, LogFile
from tests.waiting import eventually


def entry(number: int = 0, blocks: Sequence[int] = ()) -> AccessEntry:
    return AccessEntry(
        at=1_700_000_000.25 + number, id=f"r{number}", path="/v1/x", outcome="answered", status=200, blocks=blocks
    )


def read(path: Path) -> list[AccessEntry]:
    return [msgspec.json.decode(line, type=AccessEntry) for line in path.read_bytes().splitlines()]


def test_each_line_has_only_the_blocks_that_no_line_before_it_had() -> None:
    written, shown = WrittenBlocks(), []
    for chain in ([1, 2, 3], [1, 2, 3, 4], [1, 2, 9], [1, 2, 3], [7]):
        each = entry(blocks=chain)
        written.shorten(each)
        shown.append((each.shared_blocks, each.after, list(each.blocks)))
    assert shown == [(0, None, [1, 2, 3]), (3, 3, [4]), (2, 2, [9]), (3, 3, []), (0, None, [7])]


def test_what_is_remembered_is_bounded_and_begins_again_with_whole_chains() -> None:
    written = WrittenBlocks(most=4)
    for chain in ([1, 2, 3], [1, 2, 3, 4, 5]):
        written.shorten(entry(blocks=chain))
    again = entry(blocks=[1, 2, 3, 4, 5, 6])
    written.shorten(again)
    assert (again.shared_blocks, list(again.blocks)) == (5, [6])
    other = entry(blocks=[11, 12, 13])
    written.shorten(other)
    old = entry(blocks=[1, 2])
    written.shorten(old)
    assert (old.shared_blocks, list(old.blocks)) == (0, [1, 2])


def test_text_is_one_line_whatever_is_in_it() -> None:
    line = text_line(msgspec.structs.replace(entry(), model='a b\n"c"', pod="p", ms={"first_byte": 1.5, "total": 2.0}))
    assert line == (
        '2023-11-14T22:13:20.250Z 200 answered /v1/x model="a b\\n\\"c\\"" pod=p first_byte_ms=1.5 total_ms=2.0 id=r0'
    )


def test_a_file_that_is_moved_or_cut_is_begun_again(tmp_path: Path) -> None:
    path, moved = tmp_path / "access.log", tmp_path / "access.log.1"
    path.write_bytes(b"before\n")
    file = LogFile(str(path))
    file.open()
    assert not file.renew()
    file.write(b"one\n")
    path.rename(moved)
    assert file.renew()
    file.write(b"two\n")
    assert not file.renew()
    os.truncate(path, 0)
    assert file.renew()
    file.write(b"three\n")
    path.unlink()
    assert file.renew()
    file.write(b"four\n")
    file.close()
    assert (moved.read_bytes(), path.read_bytes()) == (b"before\none\n", b"four\n")


def test_a_torn_line_is_ended_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "access.log", os.write
    file = LogFile(str(path))
    file.open()
    space = 5

    def full(fd: int, data: memoryview) -> int:
        nonlocal space
        if not space:
            raise OSError(28, "No space left on device")
        done = write(fd, data[:space])
        space -= done
        return done

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        file.write(b"one\ntwo\n")
    space = 100
    file.write(b"three\n")
    file.close()
    assert path.read_bytes() == b"one\nt\nthree\n"


async def test_entries_are_written_while_it_runs_and_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    async with AccessLog(AccessLogConfig(path=str(path))) as access_log:
        access_log.add(entry(1, [5, 6]))
        await eventually(lambda: access_log.written == 1)
        moved = path.rename(tmp_path / "moved")
        access_log.add(entry(2, [5, 6, 7]))
        await eventually(lambda: access_log.written == 2)
        access_log.add(entry(3, [5, 6, 7]))
    assert [each.id for each in read(moved)] == ["r1"]
    assert [(each.id, each.after, list(each.blocks)) for each in read(path)] == [
        ("r2", None, [5, 6, 7]),
        ("r3", 7, []),
    ]


async def test_text_is_written_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    async with AccessLog(AccessLogConfig(path=str(path), format="text")) as access_log:
        access_log.add(entry(1, [5, 6]))
        access_log.add(entry(2))
    assert [line.split()[1:4] for line in path.read_text().splitlines()] == [["200", "answered", "/v1/x"]] * 2


async def test_what_cannot_be_written_is_counted_and_the_rest_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    path = folder / "access.log"
    async with AccessLog(AccessLogConfig(path=str(path))) as access_log:
        access_log.add(entry(1, [5]))
        await eventually(lambda: access_log.written == 1)
        folder.rename(tmp_path / "away")
        access_log.add(entry(2, [5, 6]))
        await eventually(lambda: access_log.dropped == 1)
        folder.mkdir()
        access_log.add(entry(3, [5, 6, 7]))
        await eventually(lambda: access_log.written == 2)
    assert [(each.id, list(each.blocks)) for each in read(path)] == [("r3", [5, 6, 7])]


@pytest.mark.parametrize("layout", ["json", "text"])
async def test_an_entry_that_cannot_be_written_does_not_end_the_log(
    tmp_path: Path, layout: Literal["json", "text"]
) -> None:
    path = tmp_path / "access.log"
    async with AccessLog(AccessLogConfig(path=str(path), format=layout)) as access_log:
        bad = entry(1)
        bad.path = "/half a \ud83d"
        access_log.add(bad)
        await eventually(lambda: access_log.dropped == 1)
        access_log.add(entry(2))
    assert (access_log.written, path.read_text().count("r1"), path.read_text().count("r2")) == (1, 0, 1)


async def test_a_log_that_nobody_takes_holds_bounded_memory(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        async with AccessLog(AccessLogConfig(path=str(pipe))) as access_log:
            for number in range(3_000):
                access_log.add(entry(number, list(range(number * 1_000, number * 1_000 + 1_000))))
            await eventually(lambda: access_log.dropped > 0)
    finally:
        os.close(reader)


async def test_a_path_that_cannot_be_opened_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\$\.accessLog\.path: cannot append to .*: No such file"):
        async with AccessLog(AccessLogConfig(path=str(tmp_path / "no" / "access.log"))):
            pass


async def test_a_sample_takes_whole_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_KEY", "k")
    async with AccessLog(AccessLogConfig(path=str(tmp_path / "a"), sample=0.5, key_env="LOG_KEY")) as half:
        taken = [half.takes(f"session-{number}") for number in range(400)]
        assert 120 < sum(taken) < 280
        assert taken == [half.takes(f"session-{number}") for number in range(400)]
    assert not AccessLog(AccessLogConfig(path="-", sample=0.0)).takes("a")


async def test_sessions_are_named_by_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE", "first-secret")
    monkeypatch.setenv("OTHER", "second-secret")
    names = []
    for env in ("ONE", "ONE", "OTHER", None, None):
        async with AccessLog(AccessLogConfig(path=str(tmp_path / "a"), key_env=env)) as access_log:
            names.append(access_log.name_of("s"))
    assert names[0] == names[1]
    assert len(set(names)) == 4
    assert all(name != "s" and len(name) == 16 for name in names)
    with pytest.raises(ConfigError, match=r"\$\.accessLog\.keyEnv: expected the environment variable `NONE`"):
        async with AccessLog(AccessLogConfig(path=str(tmp_path / "a"), key_env="NONE")):
            pass


def test_paths_start_from_the_config_file(tmp_path: Path) -> None:
    config = parse("accessLog: {path: logs/access.jsonl, keyFile: key}", base=tmp_path).access_log
    assert config is not None
    assert (config.path, config.key_file) == (str(tmp_path / "logs" / "access.jsonl"), str(tmp_path / "key"))
    with pytest.raises(ConfigError, match=r"\$\.accessLog\.keyEnv: expected either this or"):
        parse("accessLog: {path: a, keyFile: key, keyEnv: KEY}", base=tmp_path)
    output = parse("accessLog: {path: '-'}", base=tmp_path).access_log
    assert output is not None
    assert output.path == "-"
