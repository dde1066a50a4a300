"""The commands as users run them: real processes, real sockets."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from matrixinfer.config import SchedulerConfig
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.scheduler.policies import with_policy
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.model import Timing
from tests.waiting import DEADLINE_SECONDS, eventually

from .fleet import TOKENIZER, fleet

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
TEXT = "The prompt of a conversation that goes on for a while. " * 60


def chat(text: str = TEXT, **more: object) -> Json:
    return {"model": "sim", "max_tokens": 4, "messages": [{"role": "user", "content": text}], **more}


@asynccontextmanager
async def command(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "matrixinfer", *arguments, stdout=pipe, stderr=pipe
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@asynccontextmanager
async def engine(*arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, Json]]:
    async with command("engine", "--port", "0", "--json", *arguments) as process, asyncio.timeout(DEADLINE_SECONDS):
        assert process.stdout is not None
        yield process, json.loads(await process.stdout.readline())


@asynccontextmanager
async def gateway(*arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, Json]]:
    """The process and its `serving` line, which has its addresses."""
    async with command("serve", *arguments) as process:
        assert process.stderr is not None
        async with asyncio.timeout(DEADLINE_SECONDS):
            while True:
                line = json.loads(await process.stderr.readline())
                if line["event"] == "gateway_started":
                    break
        yield process, line


@asynccontextmanager
async def two_engines(*arguments: str) -> AsyncIterator[tuple[list[asyncio.subprocess.Process], list[Json]]]:
    async with AsyncExitStack() as stack:
        started = [await stack.enter_async_context(engine(*arguments)) for _ in range(2)]
        yield [process for process, _ in started], [endpoints for _, endpoints in started]


async def test_engines_named_by_url_are_found_out_and_prompts_stay_on_their_warm_pod() -> None:
    async with two_engines() as (_, engines), aiohttp.ClientSession() as session:
        urls = [each["url"] for each in engines]
        async with gateway("--worker-urls", *urls, "--port", "0", "--admin", "127.0.0.1:0") as (_, addresses):
            pods = []
            for turn in range(4):
                async with session.post(addresses["listen"] + CHAT, json=chat(TEXT * (turn + 1))) as response:
                    answer = await response.json()
                    assert response.status == 200, answer
                    pods.append(response.headers["x-matrixinfer-pod"])
            assert len(set(pods)) == 1
            assert pods[0] in {url.removeprefix("http://") for url in urls}
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 1000
            async with session.get(addresses["listen"] + "/v1/models") as response:
                assert [model["id"] for model in (await response.json())["data"]] == ["sim"]


async def test_a_config_file_routes_an_alias_by_the_local_tokenizer(tmp_path: Path) -> None:
    async with two_engines() as (_, engines), aiohttp.ClientSession() as session:
        file = tmp_path / "gateway.yaml"
        file.write_text(
            json.dumps(
                {
                    "listen": "127.0.0.1:0",
                    "admin": "127.0.0.1:0",
                    "models": [
                        {"name": "sim", "aliases": ["nice"], "tokenizer": str(TOKENIZER), "chatTemplate": "chatml"}
                    ],
                    "pods": [
                        {
                            "name": f"pod-{i}",
                            "url": each["url"],
                            "kvEvents": {"endpoint": each["kv_events"], "replayEndpoint": each["kv_replay"]},
                        }
                        for i, each in enumerate(engines)
                    ],
                }
            )
        )
        async with gateway("--config", str(file)) as (_, addresses):
            for _ in range(2):
                async with session.post(addresses["listen"] + CHAT, json=chat(model="nice")) as response:
                    answer = await response.json()
                    assert response.status == 200, answer
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            debug = f"{addresses['admin']}/debug/route"
            async with session.post(debug, params={"path": CHAT}, json=chat(model="nice")) as response:
                decision = await response.json()
            chosen = decision["pods"][decision["chosen"]]
            assert decision["model"] == "sim"
            assert decision["tokens"] == answer["usage"]["prompt_tokens"]
            assert chosen["matched_blocks"] == decision["blocks"] == decision["tokens"] // 128
            assert cached - 128 < chosen["predicted_hit_tokens"] <= cached


async def test_a_killed_engine_costs_no_request() -> None:
    async with two_engines() as (processes, engines), aiohttp.ClientSession() as session:
        urls = [each["url"] for each in engines]
        async with gateway("--worker-urls", *urls, "--port", "0", "--admin", "none") as (_, addresses):

            async def ask() -> str:
                async with session.post(addresses["listen"] + CHAT, json=chat()) as response:
                    assert response.status == 200, await response.text()
                    return response.headers["x-matrixinfer-pod"]

            warm = await ask()
            victim = next(i for i, url in enumerate(urls) if url.endswith(warm))
            processes[victim].kill()
            others = [await ask() for _ in range(5)]
            assert set(others) == {urls[1 - victim].removeprefix("http://")}


async def test_sigterm_lets_a_stream_end_and_exits_cleanly() -> None:
    async with two_engines("--decode-seconds", "0.01") as (_, engines), aiohttp.ClientSession() as session:
        urls = [each["url"] for each in engines]
        async with gateway("--worker-urls", *urls, "--port", "0", "--admin", "none") as (process, addresses):
            body = chat(stream=True, max_tokens=60)
            async with session.post(addresses["listen"] + CHAT, json=body) as response:
                first = await response.content.readline()
                assert first.startswith(b"data: ")
                process.send_signal(signal.SIGTERM)
                rest = await response.content.read()
            assert rest.rstrip().endswith(b"data: [DONE]")
            async with asyncio.timeout(DEADLINE_SECONDS):
                assert await process.wait() == 0


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_the_exit_code_is_that_of_a_clean_end_however_many_signals_come(workers: str) -> None:
    async with engine() as (_, addresses):
        flags = ("--worker-urls", addresses["url"], "--port", "0", "--admin", "none", "--workers", workers)
        async with gateway(*flags) as (process, _):
            while process.returncode is None:
                for number in (signal.SIGTERM, signal.SIGHUP):
                    with suppress(ProcessLookupError):
                        os.kill(process.pid, number)  # the process's own method may take its exit code away
                await asyncio.sleep(0.001)
            assert process.returncode == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "pods: [{name: a, url: 'http://h:1', kvEvents: {endpont: x}}]",
            "$.pods[0].kvEvents.endpont: unknown key; did you mean `endpoint`?",
        ),
        (
            "{pods: [{name: a, url: 'http://h:1'}], scheduler: {plugins: {Score: {enabled: [kvcache-awar]}}}}",
            "did you mean `kvcache-aware`?",
        ),
        ("{pods: [{name: a, url: 'http://h:1'}], models: [{name: m, tokenizer: ./none}]}", "$.models[0]"),
        ("{}", "$.pods: no engines"),
    ],
)
async def test_a_wrong_configuration_is_refused_at_start_by_name(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(text)
    async with command("serve", "--config", str(file)) as process, asyncio.timeout(DEADLINE_SECONDS):
        _, error = await process.communicate()
        assert process.returncode == 2
        assert message in error.decode()
        assert "Traceback" not in error.decode()


async def test_a_taken_port_is_reported_in_one_line() -> None:
    async with engine() as (_, endpoints):
        port = endpoints["url"].rpartition(":")[2]
        arguments = ("serve", "--worker-urls", endpoints["url"], "--port", port, "--admin", "none")
        async with command(*arguments) as process, asyncio.timeout(DEADLINE_SECONDS):
            _, error = await process.communicate()
            assert process.returncode == 2
            assert f"--port, --admin: cannot listen: [Errno {errno.EADDRINUSE}]" in error.decode()
            assert port in error.decode()
            assert "Traceback" not in error.decode()


async def test_a_dry_run_changes_nothing(tokenizer: LocalTokenizer) -> None:
    config = SimEngineConfig()
    for policy in ("round_robin", "random", "cache_aware"):
        async with fleet(tokenizer, config, pods=3, scheduler=with_policy(SchedulerConfig(), policy)) as target:
            ranked = [(await target.explain(CHAT, chat()))["ranked"] for _ in range(4)]
            assert all(each == ranked[0] for each in ranked)
            _, pod = await target.post(CHAT, chat())
            assert pod == ranked[0][0]


async def test_a_request_in_flight_counts_as_held_and_as_load(tokenizer: LocalTokenizer) -> None:
    slow = SimEngineConfig(timing=Timing(step=0.5))
    async with fleet(tokenizer, slow, pods=2) as target:
        before = await target.explain(CHAT, chat())
        assert {pod["pending_blocks"] for pod in before["pods"].values()} == {0}
        request = asyncio.create_task(target.post(CHAT, chat()))
        await eventually(lambda: any(engine.stats.running for engine in target.engines))
        during = await target.explain(CHAT, chat())
        (busy,) = [name for name, pod in during["pods"].items() if pod["in_flight"]]
        assert during["pods"][busy]["pending_blocks"] == during["blocks"] > 0
        assert during["pods"][busy]["in_flight"] == 1
        _, pod = await request
        assert pod == busy
