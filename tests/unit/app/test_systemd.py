from __future__ import annotations

import asyncio
import configparser
import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from matrixinfer.app.systemd import Notifier
from matrixinfer.cli.running import run_until_stopped
from matrixinfer.config import Config
from tests.waiting import eventually

UNIT = Path(__file__).parents[3] / "deploy" / "matrixinfer.service"


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket on which systemd listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.setblocking(False)
        yield listening


def heard(manager: socket.socket) -> list[str]:
    messages = []
    while True:
        try:
            messages.append(manager.recv(4096).decode())
        except BlockingIOError:
            return messages


def environment(manager: socket.socket, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": manager.getsockname(), **more}


async def test_a_service_reports_its_start_its_life_and_its_end(manager: socket.socket) -> None:
    seen: list[str] = []

    @asynccontextmanager
    async def service():  # type: ignore[no-untyped-def]
        yield
        seen.extend(heard(manager))
        await eventually(lambda: "WATCHDOG=1" in heard(manager))  # also while it drains

    def lives() -> bool:
        seen.extend(heard(manager))
        return seen.count("WATCHDOG=1") > 2

    async def stop() -> None:
        await eventually(lives)
        os.kill(os.getpid(), signal.SIGTERM)

    async with asyncio.TaskGroup() as group:
        notifier = Notifier(environment(manager, WATCHDOG_USEC="100000"), 1)
        await run_until_stopped(service(), path="here", on_started=lambda: group.create_task(stop()), notifier=notifier)
    assert [each for each in seen if each != "WATCHDOG=1"] == ["READY=1", "STOPPING=1"]


def test_a_reload_is_timed(manager: socket.socket) -> None:
    Notifier(environment(manager), 1).reloading()
    (message,) = heard(manager)
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", message)


def test_an_abstract_socket_is_reached() -> None:
    name = f"matrixinfer-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{name}")
        Notifier({"NOTIFY_SOCKET": f"@{name}"}, 1).ready()
        assert listening.recv(100) == b"READY=1"


@pytest.mark.parametrize("path", ["", "/does/not/exist"])
def test_without_a_manager_nothing_happens(path: str) -> None:
    Notifier({"NOTIFY_SOCKET": path}, 1).ready()


async def test_the_watchdog_of_another_process_is_not_fed(manager: socket.socket) -> None:
    await Notifier(environment(manager, WATCHDOG_USEC="1000", WATCHDOG_PID="7"), 1).watch()
    assert heard(manager) == []


def test_the_unit_file_fits_the_gateway() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None, delimiters="=")
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    service, drain = unit["Service"], Config().drain
    assert service["Type"] == "notify-reload"
    assert "matrixinfer serve --config " in service["ExecStart"]
    assert float(service["TimeoutStopSec"]) > drain.delay_seconds + drain.timeout_seconds
