"""Pods that are listed, added, drained and removed while a real gateway runs before real engines."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest

from matrixinfer.app.service import Service
from matrixinfer.config import (
    Config,
    DiscoveryConfig,
    DnsSource,
    FileSource,
    LimitsConfig,
    OutliersConfig,
    PodConfig,
    PodWatchConfig,
    SchedulerConfig,
    checked,
)
from matrixinfer.errors import ConfigError
from matrixinfer.pods.discovery.discovery import listed_now
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.model import Timing
from matrixinfer.sim.server import SimEngine
from tests.integration.gateway_support import FOREVER
from tests.name_server import name_server
from tests.waiting import eventually

PATH = "/v1/completions"


@dataclass
class World:
    service: Service
    client: aiohttp.ClientSession

    async def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        url = f"{self.service.gateway.admin_url}/admin/pods{path}"
        async with self.client.request(method, url, json=body) as response:
            return response.status, await response.json()

    async def pods(self) -> dict[str, dict[str, Any]]:
        status, answer = await self.call("GET", "")
        assert status == 200
        return {pod["name"]: pod for pod in answer["pods"]}

    async def ask(self, **fields: object) -> tuple[int, str | None]:
        """The status of an answer, and the pod that gave it."""
        body = {"model": "sim", "prompt": list(range(100)), "max_tokens": 2, **fields}
        async with self.client.post(self.service.gateway.url + PATH, json=body) as response:
            await response.read()
            return response.status, response.headers.get("x-matrixinfer-pod")

    async def serves(self, *names: str) -> None:
        """Wait until just these pods are there and answer."""

        async def does() -> bool:
            pods = {name: pod for name, pod in (await self.pods()).items() if pod["state"] == "present"}
            return pods.keys() == set(names) and all(pod["healthy"] and pod["model"] for pod in pods.values())

        await eventually(does, pause=0.05)

    def shown(self) -> bytes:
        return self.service.metrics.render()


@asynccontextmanager
async def world(*pods: PodConfig, limits: LimitsConfig | None = None, **discovery: Any) -> AsyncIterator[World]:
    config = Config(
        listen="127.0.0.1:0",
        admin="127.0.0.1:0",
        pods=pods,
        limits=limits or LimitsConfig(),
        pod_watch=PodWatchConfig(scrape_interval_seconds=0.1),
        outliers=OutliersConfig(max_ejected_share=0.0),
        scheduler=SchedulerConfig(seed=1),
        discovery=DiscoveryConfig(**{"start_empty": True, **discovery}),
    )
    async with Service(checked(config)) as service, aiohttp.ClientSession() as client:
        yield World(service, client)


@asynccontextmanager
async def engines(
    tokenizer: LocalTokenizer, count: int, *, token_seconds: float = 0.001
) -> AsyncIterator[Sequence[SimEngine]]:
    engine = SimEngineConfig(timing=Timing(step=token_seconds, prefill_token=0.0, decode_sequence=0.0))
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(SimEngine(engine, tokenizer)) for _ in range(count)]


def listed(**urls: str) -> str:
    return json.dumps([{"name": name, "url": url} for name, url in urls.items()])


async def test_pods_follow_a_file(tmp_path: Path, tokenizer: LocalTokenizer) -> None:
    file = tmp_path / "pods.json"

    def replace(text: str) -> None:
        file.with_suffix(".new").write_text(text)
        file.with_suffix(".new").replace(file)

    async with engines(tokenizer, 2) as (one, two):
        replace(listed(a=one.url))
        async with world(files=(FileSource(path=str(file), interval_seconds=0.05),)) as front:
            await front.serves("a")
            assert await front.ask() == (200, "a")
            replace(listed(a=one.url, b=two.url))
            await front.serves("a", "b")
            replace("[{")
            await eventually(
                lambda: b'matrixinfer_discovery_failing{source="file:%s"} 1.0' % str(file).encode() in front.shown()
            )
            assert (await front.ask())[0] == 200
            assert (await front.pods()).keys() == {"a", "b"}
            replace(listed(b=two.url))
            await front.serves("b")
            assert await front.ask() == (200, "b")


async def test_pods_follow_a_name(tokenizer: LocalTokenizer) -> None:
    async with engines(tokenizer, 1) as (one,), name_server() as names:
        port = int(one.url.rsplit(":", 1)[1])
        names.records = {"A": ["127.0.0.1"]}
        source = DnsSource(name="engines.test", port=port, interval_seconds=0.1, nameservers=(names.address,))
        async with world(dns=(source,)) as front:
            await front.serves(f"127.0.0.1:{port}")
            assert (await front.ask())[0] == 200


async def test_pods_are_added_and_removed_by_operators(tokenizer: LocalTokenizer) -> None:
    async with engines(tokenizer, 2) as (one, two), world(PodConfig(name="a", url=one.url)) as front:
        body = {"name": "b", "url": f"{two.url}/"}
        assert await front.call("POST", "", body) == (201, {"name": "b", "result": "added"})
        assert await front.call("POST", "", body) == (200, {"name": "b", "result": "unchanged"})
        await front.serves("a", "b")
        assert (await front.pods())["b"] == {
            "name": "b",
            "url": two.url,
            "source": "admin",
            "state": "present",
            "in_flight": 0,
            "healthy": True,
            "model": "sim",
        }
        assert await front.call("POST", "", {**body, "kvEvents": "none"}) == (200, {"name": "b", "result": "changed"})
        await front.serves("a", "b")
        assert await front.call("DELETE", "/b") == (200, {"name": "b", "result": "removed"})
        assert await front.call("DELETE", "/b") == (200, {"name": "b", "result": "absent"})
        assert (await front.pods()).keys() == {"a"}


@pytest.mark.parametrize(
    ("body", "status", "part"),
    [
        ({"name": "b"}, 400, "$: missing the required key `url`"),
        ({"name": "b" * 300, "url": "http://b:1"}, 400, "$.name: expected 1 to 253 printable characters"),
        ({"name": "", "url": "http://b:1"}, 400, "$.name: expected 1 to 253 printable characters"),
        ({"name": "b\r\nSet-Cookie: x", "url": "http://b:1"}, 400, "$.name: expected 1 to 253 printable characters"),
        ({"name": "b", "url": "https://b:1", "tls": {"caFile": "/etc/passwd"}}, 400, "$.tls: expected no files"),
        ({"name": "b", "url": "https://b:1", "tls": {"certFile": "x"}}, 400, "$.tls.keyFile: expected"),
        ({"name": "b", "url": "x"}, 400, "$.url: expected `http://host:port`"),
        ({"name": "b", "url": "http://b:1", "weight": 1}, 400, "$.weight: unknown key"),
        ([], 400, "$: expected a mapping"),
        ({"name": "a", "url": "http://b:1"}, 409, "Pod `a` comes from `config`: change it there."),
        ({"name": "b", "url": "http://127.0.0.1:1"}, 409, "is already the URL of pod `a`"),
    ],
)
async def test_a_bad_pod_is_refused_with_the_reason(body: object, status: int, part: str) -> None:
    async with world(PodConfig(name="a", url="http://127.0.0.1:1")) as front:
        got, answer = await front.call("POST", "", body)
        assert got == status
        assert part in answer["error"]["message"]
        assert (await front.pods()).keys() == {"a"}


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff", b'{"name": "\xff"}', b"[" * 5000, b'{"name": "b"' + b" " * 70_000, b'{"name": ' + b"9" * 5000],
)
async def test_a_body_that_cannot_be_read_is_refused(body: bytes) -> None:
    async with world(PodConfig(name="a", url="http://127.0.0.1:1")) as front:
        async with front.client.post(f"{front.service.gateway.admin_url}/admin/pods", data=body) as response:
            assert response.status == 400, await response.text()
        assert (await front.pods()).keys() == {"a"}


async def test_a_body_that_never_comes_is_not_waited_for() -> None:
    async with world(
        PodConfig(name="a", url="http://127.0.0.1:1"), limits=LimitsConfig(body_timeout_seconds=0.1)
    ) as front:

        async def nothing() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.Event().wait()

        async with front.client.post(f"{front.service.gateway.admin_url}/admin/pods", data=nothing()) as response:
            assert response.status == 408, await response.text()


async def test_a_pod_of_another_source_is_not_removed() -> None:
    async with world(PodConfig(name="a", url="http://127.0.0.1:1")) as front:
        status, answer = await front.call("DELETE", "/a")
        assert (status, answer["error"]["message"]) == (
            409,
            "Pod `a` comes from `config`: remove it there, or drain it.",
        )


async def test_a_drained_pod_finishes_its_requests_and_gets_no_more(tokenizer: LocalTokenizer) -> None:
    async with engines(tokenizer, 2, token_seconds=0.05) as (one, two):
        pods = PodConfig(name="a", url=one.url), PodConfig(name="b", url=two.url)
        async with world(*pods) as front:
            await front.serves("a", "b")
            running = [asyncio.create_task(front.ask(prompt=[i] * 100, max_tokens=40)) for i in range(6)]
            await eventually(
                lambda: front.service.state.load.in_flight("a") > 0 and front.service.state.load.total() == 6
            )
            status, answer = await front.call("POST", "/a/drain?seconds=60")
            assert (status, answer) == (202, {"name": "a", "result": "draining", "seconds": 60.0})
            assert (await front.pods())["a"]["state"] == "draining"
            assert {await front.ask(prompt=[100 + i] * 100) for i in range(8)} == {(200, "b")}
            finished = await asyncio.gather(*running)
            assert {status for status, _ in finished} == {200}
            assert "a" in {pod for _, pod in finished}

            async def drained() -> bool:
                return bool((await front.pods())["a"]["state"] == "drained")

            await eventually(drained)
            assert [pod.name for pod in front.service.engines.registry.pods] == ["b"]
            assert (await front.call("POST", "/a/drain"))[0] == 202  # again changes nothing
            assert await front.call("DELETE", "/a/drain") == (200, {"name": "a", "result": "present"})
            await front.serves("a", "b")


async def test_a_drain_is_bounded_and_cuts_no_request(tokenizer: LocalTokenizer) -> None:
    async with engines(tokenizer, 1, token_seconds=0.05) as (one,), world(PodConfig(name="a", url=one.url)) as front:
        await front.serves("a")
        running = asyncio.create_task(front.ask(max_tokens=60))
        await eventually(lambda: front.service.state.load.total() == 1)
        await front.call("POST", "/a/drain?seconds=0.2")
        assert (await front.ask())[0] == 503
        await eventually(lambda: not front.service.engines.registry.pods)
        assert not running.done()
        assert await running == (200, "a")


async def test_a_drain_can_be_called_off(tokenizer: LocalTokenizer) -> None:
    async with engines(tokenizer, 1, token_seconds=0.05) as (one,), world(PodConfig(name="a", url=one.url)) as front:
        await front.serves("a")
        running = asyncio.create_task(front.ask(max_tokens=40))
        await eventually(lambda: front.service.state.load.total() == 1)
        await front.call("POST", "/a/drain")
        assert await front.call("DELETE", "/a/drain") == (200, {"name": "a", "result": "present"})
        assert await front.ask() == (200, "a")
        assert await running == (200, "a")
        assert (await front.pods())["a"]["state"] == "present"


async def test_unknown_pods_and_bad_times_are_refused() -> None:
    async with world(PodConfig(name="a", url="http://127.0.0.1:1")) as front:
        assert (await front.call("POST", "/x/drain"))[0] == 404
        assert (await front.call("DELETE", "/x/drain"))[0] == 404
        assert (await front.call("GET", "/x"))[0] == 404
        assert (await front.call("POST", "/a/drain?seconds=soon"))[0] == 400
        assert (await front.call("POST", "/a"))[0] == 405
        assert (await front.call("GET", "/a"))[0] == 200


async def test_nothing_stays_of_a_pod_that_was_there(tokenizer: LocalTokenizer) -> None:
    async with engines(tokenizer, 2) as (one, two), world(PodConfig(name="a", url=one.url)) as front:
        name = "b.default:8000"
        await front.call("POST", "", {"name": name, "url": two.url})
        await front.serves("a", name)
        service = front.service
        for number in range(12):
            assert (await front.ask(prompt=[number] * 200))[0] == 200
        await eventually(lambda: service.engines.setup.index.stats().pods == 2)
        assert name in service.engines.subscriber.feeds
        pool = service._upstream._pool
        assert len(pool._idle) == 2
        await front.call("DELETE", "/" + quote(name, safe=""))
        assert name not in service.engines.subscriber.feeds
        assert not service.engines.registry.knows(name)
        assert service.state.load.in_flight(name) == 0
        assert len(pool._idle) == 1
        assert name.encode() not in front.shown()
        assert f"watch {name}" not in {task.get_name() for task in asyncio.all_tasks() if not task.cancelling()}
        await eventually(lambda: service.engines.setup.index.stats().pods == 1)


async def test_a_pod_that_comes_later_takes_its_share_bit_by_bit(tokenizer: LocalTokenizer) -> None:
    async with engines(tokenizer, 2, token_seconds=0.2) as (one, two):
        old = PodConfig(name="a", url=one.url)
        async with world(old, slow_start_seconds=FOREVER) as front:
            await front.serves("a")
            running = [asyncio.create_task(front.ask(prompt=[i] * 100, max_tokens=200)) for i in range(20)]
            await eventually(lambda: front.service.state.load.in_flight("a") == 20)
            front.service.engines.registry.pods[0].up_since = -FOREVER  # it has been there for long
            await front.call("POST", "", {"name": "b", "url": two.url})
            await front.serves("a", "b")
            running += [asyncio.create_task(front.ask(prompt=[50 + i] * 100, max_tokens=200)) for i in range(10)]
            await eventually(lambda: front.service.state.load.total() == 30)
            # a tenth of what `a` has, instead of nearly all of them
            assert 1 <= front.service.state.load.in_flight("b") <= 3
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


async def test_the_doctor_examines_what_the_sources_list(tmp_path: Path, tokenizer: LocalTokenizer) -> None:
    async with engines(tokenizer, 1) as (one,):
        (tmp_path / "pods.json").write_text(listed(a=one.url))
        (tmp_path / "config.yaml").write_text("discovery: {files: [{path: pods.json}]}")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "matrixinfer", "doctor", "--no-probe", "--json"),
            *("--config", str(tmp_path / "config.yaml"), "--patience", "20"),
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate()
        assert json.loads(out)["summary"]["pods"] == 1


async def test_a_source_that_cannot_be_read_is_said_where_it_is_read_once(tmp_path: Path) -> None:
    missing = FileSource(path=str(tmp_path / "missing.json"))
    with pytest.raises(ConfigError, match=r"missing\.json: No such file"):
        await listed_now([missing], 20.0)
