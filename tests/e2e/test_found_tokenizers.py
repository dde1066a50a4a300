"""A gateway that is told no tokenizer: it finds the engine's own, checks it, and uses it as far as it agrees."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from matrixinfer.app.service import Service
from matrixinfer.config import Config, PodConfig, PodWatchConfig, TokenizationConfig, checked
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.model import Timing
from matrixinfer.sim.server import SimEngine
from tests.unit.prompt.support import folder
from tests.unit.prompt.support import tokenizer as small_tokenizer
from tests.waiting import eventually

from .fleet import TOKENIZER, Fleet
from .hub_cache import OTHER_CHATML, REPO, cached, model_folder

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ENGINE = SimEngineConfig(
    model=REPO,
    served_model_names=("m",),
    num_blocks=5_000,
    timing=Timing(step=0.0005, prefill_token=0, decode_sequence=0),
)
BODY = {"model": "m", "messages": [{"role": "user", "content": "The river is long and old. " * 40}], "max_tokens": 1}
TEXT = {"model": "m", "prompt": "The river is long and old. " * 40, "max_tokens": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("matrixinfer.prompt.finder.POLL_SECONDS", 0.02)
    monkeypatch.setattr("matrixinfer.prompt.finder.RETRY_SECONDS", 0.1)
    return tmp_path / "hub"


@pytest.fixture(scope="session")
def other_template(tmp_path_factory: pytest.TempPathFactory) -> LocalTokenizer:
    file = tmp_path_factory.mktemp("other") / "other.jinja"
    file.write_text(OTHER_CHATML, encoding="utf-8")
    return LocalTokenizer.load(TOKENIZER, str(file))


@asynccontextmanager
async def gateway(*engines: SimEngine, **tokenization: Any) -> AsyncIterator[Fleet]:
    """A gateway that is told nothing about the engines' model."""
    config = Config(
        listen="127.0.0.1:0",
        admin="127.0.0.1:0",
        pods=tuple(PodConfig(name=f"pod-{i}", url=engine.url) for i, engine in enumerate(engines)),
        tokenization=TokenizationConfig(**{"wait_milliseconds": 2_000.0, **tokenization}),
        pod_watch=PodWatchConfig(scrape_interval_seconds=0.05, unhealthy_after_failures=1),
    )
    async with Service(checked(config)) as service, aiohttp.ClientSession() as session:
        yield Fleet(engines=engines, service=service, session=session)


async def source(target: Fleet) -> dict[str, Any]:
    async with target.session.get(f"{target.service.gateway.admin_url}/debug/tokenizers") as response:
        found: dict[str, Any] = (await response.json())["tokenizers"]["m"]
        return found


async def until(target: Fleet, **expected: object) -> dict[str, Any]:
    """Wait until the source of the token ids is as expected."""

    async def holds() -> bool:
        shown = await source(target)
        return all(shown[name] == value for name, value in expected.items())

    await eventually(holds, pause=0.05)
    return await source(target)


async def is_rendered_here(target: Fleet, path: str, body: dict[str, Any]) -> bool:
    """Whether the gateway tokenizes such a prompt itself: a repeated prompt is remembered, so it must be a new one."""
    answers = sum(cost.answers for cost in target.service._remote.costs.values())  # noqa: SLF001 - counts questions
    decision = await target.explain(path, body)
    assert decision["tokens"] is not None, decision["notes"]
    return sum(cost.answers for cost in target.service._remote.costs.values()) == answers  # noqa: SLF001


async def test_a_tokenizer_in_the_cache_is_found_checked_and_used(cache: Path, tokenizer: LocalTokenizer) -> None:
    path = cached(cache)
    async with SimEngine(ENGINE, tokenizer) as one, SimEngine(ENGINE, tokenizer) as two, gateway(one, two) as target:
        shown = await until(target, source="found")
        assert (shown["path"], shown["chats"], shown["refused"]) == (str(path), "found", {})
        assert shown["checked"] == ["pod-0", "pod-1"]
        assert "abc123 (main)" in shown["origin"]
        assert await is_rendered_here(target, CHAT, BODY)
        answer, _ = await target.post(CHAT, BODY)
        assert (await target.explain(CHAT, BODY))["tokens"] == answer["usage"]["prompt_tokens"]
        assert await target.metric('matrixinfer_tokenizer_source{model="m",source="found"}') == 1
        assert await target.metric('matrixinfer_tokenizer_source{model="m",source="asked"}') == 0


async def test_the_engines_own_path_is_used_if_it_is_here(tmp_path: Path, tokenizer: LocalTokenizer) -> None:
    path = model_folder(tmp_path / "models" / "river")
    async with SimEngine(replace(ENGINE, model=str(path)), tokenizer) as engine, gateway(engine) as target:
        shown = await until(target, source="found")
        assert (shown["path"], shown["origin"]) == (str(path), "the engine's own path")


async def test_sglang_says_elsewhere_than_vllm_where_its_tokenizer_is(cache: Path, tokenizer: LocalTokenizer) -> None:
    path = cached(cache)
    engine = replace(ENGINE, flavor="sglang", cache_report=True)  # its `root` is the name that it serves
    async with SimEngine(engine, tokenizer) as one, gateway(one) as target:
        shown = await until(target, source="found")
        assert (shown["path"], shown["checked"]) == (str(path), ["pod-0"])
        assert await is_rendered_here(target, CHAT, BODY)


async def test_another_template_in_the_engine_leaves_chats_to_it(
    cache: Path, tokenizer: LocalTokenizer, other_template: LocalTokenizer
) -> None:
    path = cached(cache)
    async with SimEngine(ENGINE, other_template) as engine, gateway(engine) as target:
        shown = await until(target, source="found")
        assert (shown["path"], shown["chats"]) == (str(path), "asked")
        assert shown["reason"].startswith("a chat differs from the token ids of pod-0 from token ")
        assert await is_rendered_here(target, COMPLETIONS, TEXT)
        assert not await is_rendered_here(target, CHAT, BODY)
        answer, _ = await target.post(CHAT, BODY)
        assert (await target.explain(CHAT, BODY))["tokens"] == answer["usage"]["prompt_tokens"]


async def test_another_vocabulary_is_refused_and_the_engine_is_asked(cache: Path, tokenizer: LocalTokenizer) -> None:
    path = cached(cache)
    (path / "tokenizer.json").unlink()
    folder(path, small_tokenizer())
    async with SimEngine(ENGINE, tokenizer) as engine, gateway(engine) as target:
        await eventually(lambda: bool(target.service._finder.sources["m"].refused))  # noqa: SLF001
        shown = await source(target)
        assert shown["source"] == "asked"
        assert list(shown["refused"]) == [str(path)]
        assert shown["refused"][str(path)].startswith("a text differs from the token ids of pod-0 from token ")
        assert not await is_rendered_here(target, COMPLETIONS, TEXT)
        assert (await source(target))["asking"]["answers"] >= 1


async def test_nothing_to_be_found_says_why(cache: Path, tokenizer: LocalTokenizer) -> None:
    async with SimEngine(ENGINE, tokenizer) as engine, gateway(engine) as target:
        shown = await until(target, reason=f"{REPO} is not in {cache}")
        assert (shown["source"], shown["chats"]) == ("asked", "asked")
        cached(cache)
        await until(target, source="found")  # tried again later


async def test_turned_off_nothing_is_looked_for(cache: Path, tokenizer: LocalTokenizer) -> None:
    cached(cache)
    async with SimEngine(ENGINE, tokenizer) as engine, gateway(engine, find="none") as target:
        shown = await until(target, reason="`tokenization.find` is `none`")
        assert shown["source"] == "asked"


async def test_an_engine_that_restarts_with_another_template_is_noticed(
    cache: Path, tokenizer: LocalTokenizer, other_template: LocalTokenizer
) -> None:
    cached(cache)
    async with SimEngine(ENGINE, tokenizer) as engine:
        port = int(engine.url.rpartition(":")[2])
        async with gateway(engine) as target:
            await until(target, source="found", chats="found")
            await engine.__aexit__(None, None, None)
            await eventually(lambda: not target.service.engines.registry.any_healthy())
            await asyncio.sleep(0.1)  # the finder has looked
            async with SimEngine(replace(ENGINE, port=port), other_template):
                await until(target, source="found", chats="asked")


async def test_an_engine_that_joins_with_another_vocabulary_ends_the_use(
    cache: Path, tokenizer: LocalTokenizer, tmp_path: Path
) -> None:
    path = cached(cache)
    small = LocalTokenizer.load(folder(tmp_path / "small", small_tokenizer()), "chatml")
    async with (
        SimEngine(ENGINE, tokenizer) as one,
        SimEngine(ENGINE, small) as two,
        gateway(one) as target,
    ):
        await until(target, source="found")
        target.service.join(PodConfig(name="pod-1", url=two.url))
        shown = await until(target, source="asked")
        assert shown["refused"][str(path)].startswith("a text differs from the token ids of pod-1 ")
