"""Runs the doctor command, against engines with one fault each."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog
import yaml
from aiohttp import web

from matrixinfer.cli import main
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.model import Timing
from matrixinfer.sim.server import SimEngine
from tests.waiting import DEADLINE_SECONDS

FAST = SimEngineConfig(timing=Timing(step=0.0005, prefill_token=0, decode_sequence=0), num_blocks=1000)
PATIENCE = DEADLINE_SECONDS
SHORT_PATIENCE = 3.0
"""Seconds, for tests in which the doctor must find that something stays silent."""
Change = Callable[[int, bytes], tuple[int, bytes]]
"""From status and body of an answer to the ones that replace them."""

UNHURRIED = {"waitMilliseconds": 5000}
"""A busy machine may tokenize slowly, which is not what is tested."""


class DoctorCommand:
    """Runs `matrixinfer doctor` on fleets that it puts in a config file."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys

    async def run(self, *arguments: str, patience: float = PATIENCE) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        code = await asyncio.to_thread(main, ("doctor", "--patience", str(patience), *arguments))
        out, err = self._capsys.readouterr()
        return code, out, err

    def config(self, *pods: Mapping[str, Any], **more: Any) -> str:
        file = self.folder / "gateway.yaml"
        file.write_text(yaml.safe_dump({"pods": list(pods), "tokenization": UNHURRIED, **more}))
        return str(file)

    async def check(
        self, *pods: Mapping[str, Any], arguments: tuple[str, ...] = (), patience: float = PATIENCE, **more: Any
    ) -> DoctorReport:
        """Check these pods; `more` are further top-level keys of the config."""
        config = self.config(*pods, **more)
        code, out, err = await self.run("--config", config, "--json", *arguments, patience=patience)
        assert err == ""
        return DoctorReport(code, json.loads(out))


class DoctorReport:
    """The JSON that the command printed, and its exit code."""

    def __init__(self, code: int, answer: dict[str, Any]) -> None:
        self.code = code
        self.findings: list[dict[str, Any]] = answer["findings"]
        self.summary: dict[str, int] = answer["summary"]
        assert self.summary["exit_code"] == code

    def only(self, check: str, level: str) -> dict[str, Any]:
        """The one finding that is not ok. The others must be, and the exit code must fit."""
        (bad,) = [finding for finding in self.findings if finding["level"] != "ok"] or [{}]
        assert (bad.get("check"), bad.get("level")) == (check, level), self.findings
        assert self.code == {"warning": 1, "blind": 2}[level]
        assert bad["fix"]
        return bad

    def of(self, check: str) -> list[dict[str, Any]]:
        return [finding for finding in self.findings if finding["check"] == check]


@asynccontextmanager
async def altered(engine: SimEngine, changes: Mapping[str, Change], *, date: str | None = None) -> AsyncIterator[str]:
    """The URL of a proxy of `engine` that changes its answers, by path."""
    async with aiohttp.ClientSession(engine.url) as session:

        async def answer(request: web.Request) -> web.Response:
            rank = request.headers.get("X-data-parallel-rank")
            headers = {"Content-Type": "application/json"} | ({} if rank is None else {"X-data-parallel-rank": rank})
            async with session.request(
                request.method, request.path, data=await request.read(), headers=headers
            ) as response:
                status, body = response.status, await response.read()
            if request.path in changes:
                status, body = changes[request.path](status, body)
            return web.Response(status=status, body=body, headers={} if date is None else {"Date": date})

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


def answering(value: object, status: int = 200) -> Change:
    """Replaces any answer with this one."""
    return lambda _, __: (status, json.dumps(value).encode())


@pytest.fixture(autouse=True)
def log_settings() -> Iterator[None]:
    """Undoes the command's logging setup, since the test process goes on."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
