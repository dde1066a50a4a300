"""Commands that go on until they are stopped, as processes of their own."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from tests.ports import free_port
from tests.waiting import DEADLINE_SECONDS, eventually

from .fleet import fleet

ENGINE = SimEngineConfig(model="m", block_size=16, num_blocks=5_000)


@asynccontextmanager
async def running(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "matrixinfer", *arguments, stdout=pipe, stderr=pipe, limit=2**24
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(DEADLINE_SECONDS):
        return (await process.stdout.readline()).decode()


async def stopped(process: asyncio.subprocess.Process, number: signal.Signals) -> int:
    process.send_signal(number)
    async with asyncio.timeout(DEADLINE_SECONDS):
        return await process.wait()


async def test_decisions_are_followed_until_ctrl_c(tokenizer: LocalTokenizer) -> None:
    async with fleet(tokenizer, ENGINE, pods=1) as gateway:
        await gateway.settled()
        admin = gateway.service.gateway.admin_url or ""
        async with running("explain", "--follow", "--admin", admin) as following:
            assert "predicted_hit_tokens" in await line(following)
            answer, pod = await gateway.post("/v1/completions", {"model": "m", "prompt": [1] * 40, "max_tokens": 1})
            shown = (await line(following)).split()
            assert shown[2] == pod
            assert shown[3] == str(answer["usage"]["prompt_tokens"])
            assert await stopped(following, signal.SIGINT) == 0


async def test_the_demo_is_kept_running_for_the_dashboard() -> None:
    admin = f"127.0.0.1:{free_port()}"
    small = ("--engines", "2", "--conversations", "4", "--turns", "3")
    async with running("demo", "--ui", "--admin", admin, *small) as demo, aiohttp.ClientSession() as session:
        assert "2 simulated engines" in await line(demo)
        assert (await line(demo)).strip() == f"http://{admin}/dashboard"

        async def is_used() -> bool:
            async with session.get(f"http://{admin}/debug/dashboard") as response:
                hour = (await response.json())["hour"]
            return bool(hour["requests"] > 12 and hour["reported_tokens"])  # the second set of conversations

        await eventually(is_used, pause=0.5)
        assert await stopped(demo, signal.SIGINT) == 0
        assert demo.stderr is not None
        assert await demo.stderr.read() == b""


async def test_a_gateway_that_is_lost_ends_the_following() -> None:
    async with running("explain", "--follow", "--admin", f"http://127.0.0.1:{free_port()}") as following:
        async with asyncio.timeout(DEADLINE_SECONDS):
            _, complaint = await following.communicate()
        assert (following.returncode, "cannot reach the gateway" in complaint.decode()) == (2, True)


async def test_a_watched_fleet_gives_the_exit_code_of_the_last_look() -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    arguments = ("doctor", "--watch", "0.1", "--json", "--no-probe", "--patience", "1", "--worker-urls", dead)
    async with running(*arguments) as watching:
        for _ in range(2):
            assert json.loads(await line(watching))["summary"]["blind"] == 1
        assert await stopped(watching, signal.SIGTERM) == 2
