"""A file of pods that is replaced, half written, broken and removed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from matrixinfer.config import FileSource, PodConfig
from matrixinfer.pods.discovery.file import MAX_BYTES, FilePods
from matrixinfer.tasks import cancel_and_wait
from tests.waiting import eventually

A, B = '{"name": "a", "url": "http://a:1"}', '{"name": "b", "url": "http://b:1"}'


class Seen:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.lists: list[list[str]] = []
        self.failures: list[str] = []

    def publish(self, pods: Sequence[PodConfig]) -> None:
        self.lists.append([pod.name for pod in pods])

    def replace(self, text: str) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(text)
        new.replace(self.path)

    async def last_is(self, *names: str) -> None:
        await eventually(lambda: self.lists[-1:] == [list(names)])

    async def fails(self, part: str) -> None:
        await eventually(lambda: bool(self.failures) and part in self.failures[-1])


@pytest.fixture
async def seen(tmp_path: Path) -> AsyncIterator[Seen]:
    seen = Seen(tmp_path / "pods.yaml")
    seen.replace(f"[{A}]")
    source = FilePods(FileSource(path=str(seen.path), interval_seconds=0.02))
    task = asyncio.create_task(source.watch(seen.publish, seen.failures.append))
    await seen.last_is("a")
    yield seen
    await cancel_and_wait(task)


async def test_a_file_that_is_replaced_is_read_again(seen: Seen) -> None:
    seen.replace(f"[{A}, {B}]")
    await seen.last_is("a", "b")
    seen.replace("[]")
    await seen.last_is()
    assert seen.failures == []


async def test_a_file_that_stays_the_same_is_published_once(seen: Seen) -> None:
    seen.replace(f"[{A}]")
    await asyncio.sleep(0.3)
    assert seen.lists == [["a"]]


async def test_a_broken_file_keeps_the_last_list_and_says_why(seen: Seen) -> None:
    seen.replace(f"[{A}, {{")
    await seen.fails("not valid YAML")
    seen.replace(f"[{A}, {{name: b}}]")
    await seen.fails("$.pods[1]: missing the required key `url`")
    seen.replace("")
    await seen.fails("expected a list of pods, got nothing")
    assert seen.lists == [["a"]]
    seen.replace(f"[{B}]")
    await seen.last_is("b")


async def test_a_file_that_is_written_in_place_counts_once_it_is_whole(seen: Seen) -> None:
    with seen.path.open("w") as file:
        for _ in range(20):  # what is there at each moment is a valid list, and not the one that is meant
            file.write(
                "- {name: a, url: 'http://a:1'}\n"
                if file.tell() == 0
                else f"- {{name: p{file.tell()}, url: 'http://p{file.tell()}:1'}}\n"
            )
            file.flush()
            await asyncio.sleep(0.03)
    await eventually(lambda: len(seen.lists[-1]) == 20)
    assert [len(each) for each in seen.lists] == [1, 20]


async def test_a_file_that_is_gone_keeps_the_last_list_until_it_is_back(seen: Seen) -> None:
    seen.path.unlink()
    await seen.fails("cannot read")
    assert seen.lists == [["a"]]
    seen.replace(f"[{A}]")
    await eventually(lambda: seen.lists == [["a"], ["a"]])  # says that it can be read again


async def test_a_file_that_is_too_large_is_not_read(seen: Seen) -> None:
    seen.replace("#" * (MAX_BYTES + 1))
    await seen.fails("expected at most")
