"""The configuration of a real process changes while clients are served."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import aiohttp

from tests.waiting import DEADLINE_SECONDS, eventually

from .test_serve import engine, gateway

COMPLETIONS = "/v1/completions"


async def event(process: asyncio.subprocess.Process, *names: str) -> dict[str, object]:
    """The next line of the log with one of these events."""
    assert process.stderr is not None
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            line: dict[str, object] = json.loads(await process.stderr.readline())
            if line["event"] in names:
                return line


async def test_a_hang_up_moves_new_requests_to_other_pods_while_a_stream_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"

    def write(url: str, **more: object) -> None:
        config = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "pods": [{"name": url[-5:], "url": url}]}
        file.write_text(json.dumps({**config, "reload": {"watch": False}, **more}))

    async with engine("--step-seconds", "0.03") as (_, one), engine() as (_, two), aiohttp.ClientSession() as session:
        write(one["url"])
        async with gateway("--config", str(file)) as (process, addresses):
            url = addresses["listen"] + COMPLETIONS
            body = {"model": "sim", "prompt": [1] * 50, "max_tokens": 60, "stream": True}
            async with session.post(url, json=body) as stream:
                assert stream.status == 200
                await stream.content.readline()
                write(two["url"], limits={"maxBodyBytes": 5000})
                process.send_signal(signal.SIGHUP)
                line = await event(process, "config_reloaded", "config_reload_failed", "config_reload_refused")
                assert (line["event"], line["trigger"], line["generation"]) == ("config_reloaded", "signal", 2)

                async def goes_to_the_new_pod() -> bool:  # once that has said what it serves
                    async with session.post(url, json={**body, "stream": False, "max_tokens": 1}) as response:
                        return response.headers.get("x-matrixinfer-pod") == str(two["url"])[-5:]

                await eventually(goes_to_the_new_pod)
                write(two["url"], listen="127.0.0.1:1")
                process.send_signal(signal.SIGHUP)
                line = await event(process, "config_reload_refused")
                assert line["needs_restart"] == ["listen"]
                rest = await stream.content.read()
                assert b"data: [DONE]" in rest
                assert stream.headers["x-matrixinfer-pod"] == one["url"][-5:]
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(DEADLINE_SECONDS):
                await process.communicate()
            assert process.returncode == 0
