"""Gateways and agents around a real Redis, before simulated engines: who reads and writes what in which mode."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import structlog

from matrixinfer.app.agent import Agent
from matrixinfer.app.service import Service
from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config import (
    BlocksConfig,
    Config,
    IndexConfig,
    ModelConfig,
    PluginArgs,
    PodConfig,
    RedisConfig,
    SchedulerConfig,
    checked,
)
from matrixinfer.index.redis.dry_run import DryRunIndex
from matrixinfer.index.redis.match_watch import LOOKUPS
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.server import SimEngine
from tests.e2e.fleet import TOKENIZER
from tests.servers import Server, server
from tests.waiting import DEADLINE_SECONDS, eventually

PATH = "/v1/completions"
PROMPT = list(range(1000, 1700))
"""Five blocks of 128 tokens, and some more."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("redis")) as made:
        yield made


@pytest.fixture
def redis(running: Server) -> Server:
    with running.client() as client:
        client.flushall()
    return running


@pytest.fixture(scope="module")
def tokenizer() -> LocalTokenizer:
    return LocalTokenizer.load(TOKENIZER, "chatml")


@pytest.fixture
async def engines(tokenizer: LocalTokenizer) -> AsyncIterator[Sequence[SimEngine]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(SimEngine(SimEngineConfig(), tokenizer)) for _ in range(2)]


def config(engines: Sequence[SimEngine], redis: Server, **index: Any) -> Config:
    return checked(
        Config(
            listen="127.0.0.1:0",
            admin="127.0.0.1:0",
            models=(ModelConfig(name="sim", tokenizer=str(TOKENIZER), chat_template="chatml"),),
            pods=tuple(PodConfig(name=f"pod-{n}.test", url=engine.url) for n, engine in enumerate(engines)),
            index=IndexConfig(lease_seconds=2.0, **index),
            redis=RedisConfig(host="127.0.0.1", port=redis.port, deadline_seconds=DEADLINE_SECONDS, share_load=False),
            scheduler=SchedulerConfig(
                plugin_config=(PluginArgs(name="kvcache-aware", args=dict(SCHEME)),), pending_seconds=0.0
            ),
        )
    )


SCHEME: dict[str, Any] = {"maxBlocksToMatch": 0}


class Client:
    def __init__(self, session: aiohttp.ClientSession, service: Service) -> None:
        self._session = session
        self._service = service

    async def explain(self, prompt: Sequence[int] = PROMPT) -> dict[str, Any]:
        """What would be decided."""
        async with self._session.post(
            f"{self._service.gateway.admin_url}/debug/route",
            params={"path": PATH},
            json={"model": "sim", "prompt": list(prompt)},
        ) as response:
            assert response.status == 200, await response.text()
            decision: dict[str, Any] = await response.json()
            return decision

    async def ask(self, prompt: Sequence[int] = PROMPT) -> str:
        """Send it; the pod that answered."""
        body = {"model": "sim", "prompt": list(prompt), "max_tokens": 2}
        async with self._session.post(self._service.gateway.url + PATH, json=body) as response:
            assert response.status == 200, await response.text()
            await response.read()
            return response.headers["x-matrixinfer-pod"]

    async def metric(self, series: str) -> float:
        async with self._session.get(f"{self._service.gateway.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        return next((float(line.removeprefix(series)) for line in lines if line.startswith(f"{series} ")), 0.0)

    async def holds(self, pod: str, blocks: int, trust: str = "exact") -> dict[str, Any]:
        """Wait until the gateway knows that much of a pod."""
        decision: dict[str, Any] = {}

        async def knows() -> bool:
            decision.update(await self.explain())
            return (decision["pods"][pod]["matched_blocks"], decision["pods"][pod]["trust"]) == (blocks, trust)

        await eventually(knows)
        return decision


@asynccontextmanager
async def gateway(settings: Config) -> AsyncIterator[Client]:
    async with Service(settings) as service, aiohttp.ClientSession() as session:
        yield Client(session, service)


async def test_what_an_agent_writes_all_gateways_read(engines: Sequence[SimEngine], redis: Server) -> None:
    settings = config(engines, redis, kind="redis")
    async with Agent(settings, listen="127.0.0.1:0") as agent, gateway(settings) as one, gateway(settings) as other:
        pod = await one.ask()
        await one.holds(pod, 5)
        decision = await other.holds(pod, 5)
        assert decision["chosen"] == pod == await other.ask()
        async with aiohttp.ClientSession() as session, session.get(f"{agent.url}/metrics") as response:
            text = await response.text()
        assert f'matrixinfer_redis_writer{{pod="{pod}"}} 1.0' in text
        assert f'matrixinfer_kv_trust{{pod="{pod}",trust="exact"}} 1.0' in text
        with redis.client() as client:
            block = TokenBlockProcessor(128).hashes(memoryview(b"".join(t.to_bytes(4, "big") for t in PROMPT)))[0]
            ((name, stamp),) = client.hgetall(f"matrix:kv:block:sim@{block}").items()
            assert name == pod
            assert abs(int(stamp) - time.time()) < 60
            assert client.hgetall("matrix:kv:meta:sim") == {
                "block_size": "128",
                "hash_scheme": "prefix",
                "version": "1",
            }


async def test_an_agent_that_is_gone_leaves_what_it_knew_but_less_trusted(
    engines: Sequence[SimEngine], redis: Server
) -> None:
    settings = config(engines, redis, kind="redis")
    async with gateway(settings) as client:
        async with Agent(settings, listen=None):
            pod = await client.ask()
            await client.holds(pod, 5)
        await client.holds(pod, 5, trust="stale")
        async with Agent(settings, listen=None):
            await client.holds(pod, 5)


async def test_the_gateway_may_write_and_only_one_does_for_a_pod(engines: Sequence[SimEngine], redis: Server) -> None:
    settings = config(engines, redis, kind="redis", writer="gateway")
    async with gateway(settings) as one, gateway(settings) as other:
        pod = await other.ask()
        await one.holds(pod, 5)
        await other.holds(pod, 5)
        series = f'matrixinfer_redis_writer{{pod="{pod}"}}'

        async def one_writes() -> bool:
            return sorted([await one.metric(series), await other.metric(series)]) == [0.0, 1.0]

        await eventually(one_writes)


async def test_an_embedded_index_starts_warm(engines: Sequence[SimEngine], redis: Server) -> None:
    async with gateway(config(engines, redis, writer="gateway")) as first:
        pod = await first.ask()
        await first.holds(pod, 5)
        with redis.client() as client:
            await eventually(lambda: bool(client.keys("matrix:kv:block:*")))
    silent = tuple(
        PodConfig(name=f"pod-{n}.test", url=engine.url, kv_events="none") for n, engine in enumerate(engines)
    )
    cold = config(engines, redis)
    async with gateway(
        Config(**{name: getattr(cold, name) for name in cold.__struct_fields__} | {"pods": silent})
    ) as blind:
        assert (await blind.explain())["pods"][pod]["matched_blocks"] is None
    async with gateway(config(engines, redis, warm_start=True)) as warm:
        decision = await warm.holds(pod, 5)
        assert decision["chosen"] == pod


async def test_what_others_write_is_read_and_partly_believed(engines: Sequence[SimEngine], redis: Server) -> None:
    SCHEME["hashScheme"] = "block"
    try:
        settings = config(engines, redis, kind="redis", writer="none")
    finally:
        del SCHEME["hashScheme"]
    data = memoryview(b"".join(token.to_bytes(4, "big") for token in PROMPT))
    with redis.client() as client:
        for block in TokenBlockProcessor(128, "block").hashes(data)[:4]:
            key = f"matrix:kv:block:sim@{block}"
            client.hset(key, "pod-1.test.svc.cluster.local", str(int(time.time()) + 2))
            client.hset(key, "pod-0.test.svc.cluster.local", str(int(time.time()) - 60))
    async with gateway(settings) as client_:
        decision = await client_.holds("pod-1.test", 4, trust="partial")
        assert decision["pods"]["pod-0.test"]["matched_blocks"] == 0, "older than the engine"
        assert await client_.ask() == "pod-1.test"


@pytest.mark.parametrize("pods", [1, 2])
async def test_what_others_list_under_a_pod_counts_for_its_ranks(
    tokenizer: LocalTokenizer, redis: Server, pods: int
) -> None:
    async with AsyncExitStack() as stack:
        sims = [SimEngineConfig(data_parallel_size=2), SimEngineConfig(served_model_names=("other", "sim"))][:pods]
        engines = [await stack.enter_async_context(SimEngine(each, tokenizer)) for each in sims]
        settings = config(engines, redis, kind="redis", writer="none")
        with redis.client() as client:
            for block in TokenBlockProcessor(128).chain(PROMPT)[:4]:
                client.hset(f"matrix:kv:block:sim@{block}", "pod-0.test", str(int(time.time()) + 2))
        client_ = await stack.enter_async_context(gateway(settings))
        await client_.holds("pod-0.test@dp0", 4, trust="partial")
        await client_.holds("pod-0.test@dp1", 4, trust="partial")


async def test_lookups_that_never_match_are_noticed(engines: Sequence[SimEngine], redis: Server) -> None:
    with redis.client() as client:
        for block in TokenBlockProcessor(16, "block").chain(PROMPT):
            client.hset(f"matrix:kv:block:booster@{block}", "pod-0.test", str(int(time.time()) + 2))
    async with gateway(config(engines, redis, kind="redis", writer="none")) as reader:
        for _ in range(LOOKUPS):
            await reader.explain()

        async def is_noticed() -> bool:
            return await reader.metric('matrixinfer_redis_lookups_unmatched{model="sim"}') == 1

        await eventually(is_noticed)
        async with reader._session.get(f"{reader._service.gateway.admin_url}/debug/index") as response:  # noqa: SLF001
            (problem,) = (await response.json())["unmatched"]
        assert problem["message"].endswith(
            "keys hash like scheme block, size 16, and here scheme prefix, size 128; "
            "their blocks are in Redis under the model name `booster`"
        )
        assert problem["keys"] == 43
    settings = config(engines, redis, kind="redis", writer="none")
    model = msgspec.structs.replace(settings.models[0], index_name="booster")
    right = msgspec.structs.replace(settings, models=(model,), blocks=BlocksConfig(scheme="block", size=16))
    async with gateway(right) as reader:
        await reader.holds("pod-0.test", 43, trust="partial")
        assert await reader.metric('matrixinfer_redis_lookups_unmatched{model="booster"}') == 0


async def test_an_agent_is_ready_only_while_redis_takes_its_writes(
    engines: Sequence[SimEngine], tmp_path: Path
) -> None:
    with server(tmp_path) as lost:
        async with (
            Agent(config(engines, lost, kind="redis"), listen="127.0.0.1:0") as agent,
            aiohttp.ClientSession() as session,
        ):

            async def answers(status: int, text: str) -> bool:
                async with session.get(f"{agent.url}/ready") as response:
                    return (response.status, (await response.json())["status"]) == (status, text)

            await eventually(lambda: answers(200, "ready"))
            with lost.client() as client:
                client.execute_command("REPLICAOF", "127.0.0.1", "1")  # so that it refuses writes
            await eventually(lambda: answers(503, "Redis does not accept writes"))
            with lost.client() as client:
                client.execute_command("REPLICAOF", "NO", "ONE")
            await eventually(lambda: answers(200, "ready"))
            lost.kill()
            await eventually(lambda: answers(503, "Redis does not accept writes"))


async def test_blocks_of_another_scheme_are_logged_as_a_warning(
    engines: Sequence[SimEngine], redis: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = structlog.testing.CapturingLogger()
    monkeypatch.setattr("matrixinfer.index.redis.pod_states.log", logged)
    with redis.client() as client:
        client.hset("matrix:kv:meta:sim", mapping={"block_size": "16", "hash_scheme": "prefix", "version": "1"})
    async with gateway(config(engines, redis, kind="redis")) as reader:

        async def differs() -> bool:
            return await reader.metric('matrixinfer_redis_scheme_differs{model="sim"}') > 0

        await eventually(differs)
    (call,) = logged.calls
    assert (call.method_name, call.args, call.kwargs["there"]["block_size"]) == (
        "warning",
        ("redis_scheme_differed",),
        "16",
    )


async def test_without_redis_requests_are_routed_by_load_and_say_why(
    engines: Sequence[SimEngine], redis: Server
) -> None:
    settings = config(engines, redis, kind="redis")
    nowhere = Config(
        **{name: getattr(settings, name) for name in settings.__struct_fields__}
        | {"redis": RedisConfig(host="127.0.0.1", port=1)}
    )
    async with gateway(nowhere) as client:
        assert await client.ask() in ("pod-0.test", "pod-1.test")
        decision = await client.explain()
        assert any(note.startswith("index unavailable: ") for note in decision["notes"])
        assert await client.metric('matrixinfer_degraded_total{reason="index"}') > 0


async def test_a_dry_run_says_what_would_be_written(engines: Sequence[SimEngine], redis: Server) -> None:
    lines: list[str] = []
    settings = config(engines[:1], redis, kind="redis")
    async with (
        Agent(settings, listen=None, dry_run=DryRunIndex(lines.append)),
        aiohttp.ClientSession() as session,
        session.post(engines[0].url + PATH, json={"model": "sim", "prompt": PROMPT, "max_tokens": 1}) as response,
    ):
        assert response.status == 200
        await eventually(lambda: len(lines) >= 5)
    assert all(line.startswith("HSET matrix:kv:block:sim@") for line in lines)
    with redis.client() as client:
        assert client.dbsize() == 0


async def test_passwords_are_nowhere_to_be_seen(engines: Sequence[SimEngine], redis: Server, tmp_path: Path) -> None:
    settings = config(engines, redis, kind="redis")
    secret = Config(
        **{name: getattr(settings, name) for name in settings.__struct_fields__}
        | {"redis": RedisConfig(host="127.0.0.1", port=redis.port, username="me", password="hunter2")}
    )
    with structlog.testing.capture_logs() as logs:
        async with gateway(secret) as client:
            decision = await client.explain()
    assert any("index unavailable" in note for note in decision["notes"])
    assert "hunter2" not in json.dumps(decision) + json.dumps(logs, default=str) + repr(secret)


async def test_when_redis_is_lost_what_was_sent_where_counts(engines: Sequence[SimEngine], tmp_path: Path) -> None:
    with server(tmp_path) as lost:
        settings = config(engines, lost, kind="redis")
        async with Agent(settings, listen=None), gateway(settings) as client:
            pod = await client.ask()
            await client.holds(pod, 5)
            lost.kill()
            decision = await client.explain()
            assert any(note.startswith("index unavailable: ") for note in decision["notes"])
            assert {each["trust"] for each in decision["pods"].values()} == {"none"}
            assert [await client.ask() for _ in range(4)] == [pod] * 4
