from __future__ import annotations

import asyncio
import os
from pathlib import Path

from matrixinfer.app.file_watch import FileWatch


async def test_only_other_content_is_a_change(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("a")
    watch = FileWatch(file)
    assert await watch.has_changed()
    assert not await watch.has_changed()
    os.utime(file, (1, 1))
    assert not await watch.has_changed()
    (tmp_path / "new").write_text("b")
    (tmp_path / "new").replace(file)
    assert await watch.has_changed()
    assert not await watch.has_changed()


async def test_a_file_that_is_gone_has_not_changed_and_is_compared_when_it_is_back(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("a")
    watch = FileWatch(file)
    assert await watch.has_changed()
    file.unlink()
    assert not await watch.has_changed()
    file.write_text("a")
    assert not await watch.has_changed()
    file.write_text("b")
    assert await watch.has_changed()


async def test_a_link_that_leads_elsewhere_is_followed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    link = tmp_path / "config.yaml"
    link.symlink_to("one")
    watch = FileWatch(link)
    assert await watch.has_changed()
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").replace(link)
    assert await watch.has_changed()


async def test_a_file_that_is_being_written_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("")
    watch = FileWatch(file)
    await watch.has_changed()
    with file.open("w") as writing:
        writing.write("half")
        writing.flush()
        looking = asyncio.create_task(watch.has_changed())
        await asyncio.sleep(0.05)
        writing.write(", whole")
    assert await looking
    assert not await watch.has_changed()
