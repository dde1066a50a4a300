"""A running gateway reads its configuration again: all of it takes effect, or nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog

from matrixinfer.app.service import Service
from matrixinfer.config import load
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.model import Timing
from matrixinfer.sim.server import SimEngine
from tests.waiting import eventually

HEAD = "{listen: '127.0.0.1:0', admin: '127.0.0.1:0', podWatch: {scrapeIntervalSeconds: 0.1}, "


@dataclass
class World:
    service: Service
    client: aiohttp.ClientSession
    file: Path

    def write(self, text: str) -> None:
        new = self.file.with_suffix(".new")
        new.write_text(f"{HEAD}{text}}}")
        new.replace(self.file)

    async def reload(self) -> tuple[int, dict[str, Any]]:
        async with self.client.post(f"{self.service.gateway.admin_url}/admin/reload") as response:
            return response.status, await response.json()

    async def ask(self, **fields: object) -> tuple[int, str | None]:
        body = {"model": "sim", "prompt": list(range(100)), "max_tokens": 2, **fields}
        async with self.client.post(f"{self.service.gateway.url}/v1/completions", json=body) as response:
            await response.read()
            return response.status, response.headers.get("x-matrixinfer-pod")

    def pods(self) -> list[str]:
        return [pod.name for pod in self.service.engines.registry.pods]

    def metric(self, name: str, **labels: str) -> float | None:
        return self.service.metrics.registry.get_sample_value(f"matrixinfer_{name}", labels)


@asynccontextmanager
async def world(tmp_path: Path, text: str) -> AsyncIterator[World]:
    file = tmp_path / "config.yaml"
    file.write_text(f"{HEAD}{text}}}")
    service = Service(load(file), read=lambda: load(file), config_file=file)
    async with service, aiohttp.ClientSession() as client:
        yield World(service, client, file)


def pods(**urls: str) -> str:
    return "pods: [" + ", ".join(f"{{name: {name}, url: '{url}'}}" for name, url in urls.items()) + "]"


NOBODY = pods(a="http://127.0.0.1:1")
UNWATCHED = "reload: {watch: false}, "


async def test_what_may_change_takes_effect_at_once(tmp_path: Path) -> None:
    async with world(tmp_path, UNWATCHED + NOBODY) as front:
        assert await front.reload() == (
            200,
            {"result": "unchanged", "generation": 1, "changed": [], "restart": [], "error": None},
        )
        front.write(
            UNWATCHED
            + pods(b="http://127.0.0.1:2")
            + ", limits: {maxBodyBytes: 200, memoryBytes: 20000000, connectTimeoutSeconds: 9}"
            + ", scheduler: {weights: {host: 0.1}, plugins: {Score: {enabled: [round-robin]}}}"
            + ", discovery: {slowStartSeconds: 7, drainSeconds: 8}, drain: {timeoutSeconds: 6}"
            + ", retries: {afterSend: 5}, outliers: {ejectSeconds: 4}"
        )
        status, outcome = await front.reload()
        assert (status, outcome["result"], outcome["generation"]) == (200, "applied", 2)
        assert "pods[a]" in outcome["changed"]
        assert "limits.maxBodyBytes" in outcome["changed"]
        service = front.service
        assert front.pods() == ["b"]
        assert await front.ask(prompt="x" * 300) == (413, None)
        assert service._memory.limit == 20_000_000
        assert service._upstream._pool.connect_seconds == 9
        assert service.front.fan_out._limits.connect_timeout_seconds == 9
        assert service.router._candidates._weights.host == 0.1
        assert service.router._candidates.slow_start_seconds == 7
        assert "round-robin" in service.router._scheduler.plugins
        assert service.front.pods_admin.drain_seconds == 8
        assert service.gateway._drain.timeout_seconds == 6
        assert service.front.retries._config.after_send == 5
        assert service.state.outliers._config.eject_seconds == 4
        assert front.metric("config_generation") == 2
        assert front.metric("config_reloads_total", result="applied") == 1


async def test_the_scheduler_that_has_not_changed_keeps_its_state(tmp_path: Path) -> None:
    async with world(tmp_path, UNWATCHED + NOBODY) as front:
        before = front.service.router._scheduler
        front.write(UNWATCHED + pods(b="http://127.0.0.1:2"))
        assert (await front.reload())[1]["result"] == "applied"
        assert front.service.router._scheduler is before


@pytest.mark.parametrize(
    ("text", "restart"),
    [
        ("listen: '127.0.0.1:1'", ["listen"]),
        ("blocks: {size: 64}, models: [{name: m}]", ["models[m]", "blocks.size"]),
        ("scheduler: {seed: 5, weights: {host: 0.1}}", ["scheduler.seed"]),
        ("redis: {password: secret}", ["redis"]),
    ],
)
async def test_nothing_changes_if_a_key_needs_a_restart(tmp_path: Path, text: str, restart: list[str]) -> None:
    async with world(tmp_path, UNWATCHED + NOBODY) as front:
        head = UNWATCHED + pods(b="http://127.0.0.1:2") + ", "
        new = front.file.with_suffix(".new")
        new.write_text(
            (HEAD + head + text + "}").replace(
                "listen: '127.0.0.1:0', ", "" if "listen" in text else "listen: '127.0.0.1:0', "
            )
        )
        new.replace(front.file)
        with structlog.testing.capture_logs() as logs:
            status, outcome = await front.reload()
        assert (status, outcome["result"], outcome["restart"]) == (409, "refused", restart)
        assert front.pods() == ["a"]
        (warning,) = [each for each in logs if each["event"] == "config_reload_refused"]
        assert warning["needs_restart"] == restart
        assert "secret" not in str(logs)
        assert front.metric("config_generation") == 1


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("pods: [{name: b}]", "$.pods[0]: missing the required key `url`"),
        ("limits: {maxBodyBytes: many}", "$.limits.maxBodyBytes: expected"),
        (pods(b="http://127.0.0.1:2") + ", scheduler: {plugins: {Picker: {enabled: [best]}}}", "best"),
        ("[", "not valid YAML"),
    ],
)
async def test_nothing_changes_if_the_file_is_not_valid(tmp_path: Path, text: str, error: str) -> None:
    async with world(tmp_path, UNWATCHED + NOBODY) as front:
        front.write(UNWATCHED + text)
        status, outcome = await front.reload()
        assert (status, outcome["result"]) == (422, "failed")
        assert error in outcome["error"]
        assert front.pods() == ["a"]
        assert front.metric("config_reloads_total", result="failed") == 1


async def test_what_fails_halfway_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(tmp_path, UNWATCHED + NOBODY) as front:
        fleet = front.service.pods.fleet
        published = fleet.published

        def fails(source: str, found: Any) -> None:
            published(source, found)
            monkeypatch.undo()
            raise RuntimeError("a fault")

        monkeypatch.setattr(fleet, "published", fails)
        front.write(UNWATCHED + pods(b="http://127.0.0.1:2") + ", limits: {maxBodyBytes: 200}")
        assert (await front.reload())[0] == 500
        assert front.pods() == ["a"]
        assert front.service.front.bodies._limits.max_body_bytes > 200
        assert (await front.reload())[1]["result"] == "applied"
        assert front.pods() == ["b"]


async def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    watched = "reload: {intervalSeconds: 0.05}, "
    async with world(tmp_path, watched + NOBODY) as front:
        front.write(watched + pods(b="http://127.0.0.1:2"))
        await eventually(lambda: front.pods() == ["b"])
        front.write(watched + "pods: [")
        await eventually(lambda: front.metric("config_reloads_total", result="failed") == 1)
        front.write(watched + pods(c="http://127.0.0.1:3"))
        await eventually(lambda: front.pods() == ["c"])
        assert front.metric("config_generation") == 3


async def test_a_model_gets_other_aliases(tmp_path: Path, tokenizer: LocalTokenizer) -> None:
    async with SimEngine(SimEngineConfig(), tokenizer) as engine:
        text = UNWATCHED + pods(a=engine.url) + ", models: [{name: sim, aliases: [%s]}]"
        async with world(tmp_path, text % "old") as front:
            assert ((await front.ask(model="old"))[0], (await front.ask(model="new"))[0]) == (200, 404)
            front.write(text % "new")
            status, outcome = await front.reload()
            assert (status, outcome["changed"]) == (200, ["models[sim].aliases"])
            assert ((await front.ask(model="old"))[0], (await front.ask(model="new"))[0]) == (404, 200)
            front.write(text.replace("name: sim", "name: sim, chatTemplate: chatml") % "newer")
            status, outcome = await front.reload()
            assert (status, outcome["restart"]) == (409, ["models[sim].chatTemplate"])
            assert (await front.ask(model="new"))[0] == 200


async def test_requests_in_flight_are_not_touched(tmp_path: Path, tokenizer: LocalTokenizer) -> None:
    slow = SimEngineConfig(timing=Timing(step=0.05, prefill_token=0.0, decode_sequence=0.0))
    async with SimEngine(slow, tokenizer) as one, SimEngine(slow, tokenizer) as two:
        text = UNWATCHED + pods(a=one.url)
        async with world(tmp_path, text) as front:
            running = asyncio.create_task(front.ask(max_tokens=40))
            await eventually(lambda: front.service.state.load.in_flight("a") == 1)
            front.write(UNWATCHED + pods(b=two.url) + ", limits: {requestTimeoutSeconds: 0.001}")
            assert (await front.reload())[1]["result"] == "applied"
            assert not running.done()
            assert await running == (200, "a")
            assert front.service.state.load.total() == 0


async def test_a_gateway_made_in_code_has_nothing_to_read_again(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"{HEAD}{NOBODY}}}")
    async with Service(load(file)) as service, aiohttp.ClientSession() as client:
        service.reload_soon()
        async with client.post(f"{service.gateway.admin_url}/admin/reload") as response:
            assert response.status == 409
