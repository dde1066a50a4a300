"""The dashboard's paths: its files, its data, its events, and the doctor behind its button."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from matrixinfer.config import Config, PodConfig
from matrixinfer.dashboard.examination import Examination, ExaminationFailed
from matrixinfer.dashboard.pages import STATIC
from matrixinfer.dashboard.stream import PAGES
from tests.browser.world import World
from tests.waiting import DEADLINE_SECONDS, eventually

EVENTS = "/debug/dashboard/events"
POD = Config(pods=(PodConfig(name="a", url="http://127.0.0.1:1"),))


@asynccontextmanager
async def client(world: World) -> AsyncIterator[tuple[aiohttp.ClientSession, str]]:
    timeout = aiohttp.ClientTimeout(total=DEADLINE_SECONDS)
    async with world.served() as url, aiohttp.ClientSession(timeout=timeout) as session:
        yield session, url


async def event(response: aiohttp.ClientResponse) -> Any:
    while True:
        line = await response.content.readline()
        assert line, "the stream has ended"
        if line.startswith(b"data: "):
            return msgspec.json.decode(line[6:])


async def test_every_file_is_served_and_allows_nothing_from_elsewhere() -> None:
    async with client(World(1)) as (session, url):
        names = [path.name for path in STATIC.iterdir() if path.name != "index.html"]
        assert {"app.js", "style.css", "icon.svg"} <= set(names)
        for path in ["/dashboard", *(f"/dashboard/{name}" for name in names)]:
            async with session.get(url + path) as response:
                assert response.status == 200
                policy = response.headers["Content-Security-Policy"]
                assert "default-src 'none'" in policy
                assert "unsafe" not in policy
                assert "http" not in policy
                assert response.headers["X-Content-Type-Options"] == "nosniff"
                tag = response.headers["ETag"]
            async with session.get(url + path, headers={"If-None-Match": tag}) as response:
                assert (response.status, await response.read()) == (304, b"")
        async with session.get(url + "/") as response:
            assert response.url.path == "/dashboard"
        for path in ("/dashboard/..%2fpages.py", "/dashboard/index.html", "/dashboard/", "/nothing"):
            async with session.get(url + path) as response:
                assert response.status == 404


def test_the_files_come_with_the_package() -> None:
    assert (resources.files("matrixinfer.dashboard") / "static" / "index.html").is_file()


async def test_a_page_of_another_site_gets_nothing() -> None:
    async with client(World(1)) as (session, url):
        for path in ("/dashboard", "/debug/dashboard", EVENTS):
            async with session.get(url + path, headers={"Host": "evil.example"}) as response:
                assert response.status == 403
        async with session.post(f"{url}/debug/doctor", headers={"Origin": "http://evil.example"}) as response:
            assert response.status == 403


async def test_the_snapshot_and_the_first_event_are_the_same() -> None:
    world = World(2)
    world.request()
    async with client(world) as (session, url):
        async with session.get(f"{url}/debug/dashboard") as response:
            snapshot = await response.json()
        async with session.get(url + EVENTS) as response:
            assert response.content_type == "text/event-stream"
            first = await event(response)
            second = await event(response)
    moving = ("at", "up_s", "hour", "points", "version")
    assert {key: value for key, value in first.items() if key not in moving} == {
        key: value for key, value in snapshot.items() if key not in moving
    }
    assert snapshot["names"] == world.names
    assert second["version"] > first["version"]
    assert "endpoints" not in second


async def test_what_has_changed_since_a_version_can_be_asked_for() -> None:
    world = World(2)
    async with client(world) as (session, url):
        async with session.get(f"{url}/debug/dashboard") as response:
            first = await response.json()
        world.shift += 1.0
        world.die("pod-1.inference")
        async with session.get(f"{url}/debug/dashboard", params={"since": first["version"]}) as response:
            second = await response.json()
        for wrong in ("x", "-1", "1" * 10):
            async with session.get(f"{url}/debug/dashboard", params={"since": wrong}) as response:
                assert (response.status, (await response.json())["error"]["param"]) == (400, "since")
    assert [row["name"] for row in second["endpoints"]] == ["pod-1.inference"]
    assert "about" not in second


async def test_pages_are_bounded_and_those_that_leave_make_room() -> None:
    async with client(World(1)) as (session, url):
        open_pages = [await session.get(url + EVENTS) for _ in range(PAGES)]
        async with session.get(url + EVENTS) as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "10")
            assert str(PAGES) in (await response.json())["error"]["message"]
        async with session.get(f"{url}/debug/dashboard") as response:
            assert response.status == 200
        for page in open_pages:
            page.close()

        async def has_room() -> bool:
            async with session.get(url + EVENTS) as response:
                return response.status == 200

        await eventually(has_room, pause=0.1)


async def test_a_head_request_gets_headers_and_no_stream() -> None:
    async with client(World(1)) as (session, url), session.head(url + EVENTS) as response:
        assert (response.status, response.content_type) == (200, "text/event-stream")


async def test_a_stream_ends_by_itself_when_the_gateway_stops() -> None:
    world = World(1)
    async with client(world) as (session, url):
        async with session.get(url + EVENTS) as response:
            await event(response)
            world.draining.set()
            rest = await response.content.read()
        assert b"event: stopping" in rest
        async with session.get(url + EVENTS) as response:
            assert response.status == 503


def doctor(*code: str) -> Sequence[str]:
    return (sys.executable, "-c", "\n".join(code))


async def test_the_doctor_is_given_the_configuration_as_it_is_now() -> None:
    echo = doctor("import sys, json, yaml", "print(json.dumps({'got': yaml.safe_load(sys.stdin)['pods'][0]['name']}))")
    assert await Examination(lambda: POD, command=echo).run() == {"got": "a"}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit('broken: no such thing')", "The doctor failed: broken: no such thing"),
        ("print('no JSON')", "The doctor failed: 0"),
        ("import time; time.sleep(3600)", "The doctor has not ended within 0.5 s."),
    ],
)
async def test_a_doctor_that_fails_is_said_to_have_failed(code: str, said: str) -> None:
    examination = Examination(lambda: POD, command=doctor(code), deadline=0.5 if "sleep" in code else DEADLINE_SECONDS)
    with pytest.raises(ExaminationFailed) as caught:
        await examination.run()
    assert str(caught.value) == said


async def test_one_examination_runs_at_a_time_and_ends_with_its_client(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = f"import os, pathlib, time; pathlib.Path({str(note)!r}).write_text(f'{{os.getpid()}}.'); time.sleep(3600)"
    examination = Examination(lambda: POD, command=doctor(code))
    first = asyncio.create_task(examination.run())
    await eventually(lambda: note.exists() and note.read_text().endswith("."))
    with pytest.raises(ExaminationFailed, match="being examined already"):
        await examination.run()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()[:-1]), 0)


async def test_without_a_pod_there_is_nothing_to_examine() -> None:
    with pytest.raises(ExaminationFailed, match="no pod to examine"):
        await Examination(Config, command=doctor("")).run()


async def test_a_doctor_that_cannot_be_started_is_said_so() -> None:
    with pytest.raises(ExaminationFailed, match="cannot be started"):
        await Examination(lambda: POD, command=("/nonexistent/python",)).run()
