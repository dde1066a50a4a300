"""The search for tokenizers, with engines that are played."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from matrixinfer.blocks import TokenIds
from matrixinfer.config import ModelConfig, TokenizationConfig
from matrixinfer.errors import ConfigError, TokenizeError
from matrixinfer.prompt import finder as module
from matrixinfer.prompt import hub, loader
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.chat_template import CHATML
from matrixinfer.prompt.finder import TokenizerFinder
from matrixinfer.prompt.fleet import Served
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.remote import Engine, RemoteTokenizer
from matrixinfer.prompt.requests import parse
from tests.waiting import eventually

from .support import folder, tokenizer


@dataclass
class Played:
    """An engine with a tokenizer, or one that does not answer."""

    tokenizer: LocalTokenizer | None
    url: str = "http://a"
    engine: str | None = "vllm"
    version: str | None = "0.33.0"

    def index_name(self, _: str) -> str | None:
        return None


class PlayedRemote(RemoteTokenizer):
    def __init__(self) -> None:
        self.asked = 0

    async def tokenize(
        self, prompt: Prompt, engines: Sequence[Engine], model: str, *, timeout_seconds: float
    ) -> TokenIds:
        self.asked += 1
        (engine,) = engines
        assert isinstance(engine, Played)
        if engine.tokenizer is None:
            raise TokenizeError("cannot reach it")
        return engine.tokenizer.tokenize(prompt).ids


@dataclass
class World:
    path: Path
    engines: list[Served]
    settings: TokenizationConfig = field(default_factory=TokenizationConfig)
    distrusted: bool = False
    now: float = 0.0

    def __post_init__(self) -> None:
        self.tokenizers = TokenizerManager((), self.settings, None)
        self.remote = PlayedRemote()
        self.finder = TokenizerFinder(
            (ModelConfig(name="other", tokenizer="/configured"),),
            self.settings,
            self.tokenizers,
            self.remote,
            fleet=lambda: {"m": self.engines} if self.engines else {},
            distrusts=lambda _: self.distrusted,
            environment={"HF_HUB_CACHE": str(self.path / "hub")},
            clock=lambda: self.now,
        )

    @property
    def kind(self) -> str | None:
        source = self.finder.sources.get("m")
        return None if source is None else source.kind

    @property
    def reason(self) -> str:
        source = self.finder.sources.get("m")
        return "" if source is None else source.reason or ""

    @property
    def refused(self) -> Mapping[str, str]:
        source = self.finder.sources.get("m")
        return {} if source is None else source.refused

    def has_asked_more_than(self, times: int) -> bool:
        return self.remote.asked > times

    async def is_used(self) -> bool:
        """Whether the gateway tokenizes texts itself."""
        prompt = parse("/v1/completions", b'{"model": "m", "prompt": "The river"}')
        try:
            return (await self.tokenizers.tokenize(prompt, model="m", engines=())).source == "local"
        except TokenizeError:
            return False


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = folder(tmp_path / "model", tokenizer())
    (path / "chat_template.jinja").write_text(CHATML)
    return path


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.001)


def served(path: Path, played: Played | None = None, name: str = "a") -> Served:
    played = played or Played(LocalTokenizer.load(path, None))
    return Served(engine=played, name=name, model="m", roots=(str(path),), healthy=True)


async def test_a_configured_tokenizer_is_only_reported(model: Path) -> None:
    world = World(model, [])
    assert world.finder.sources["other"].kind == "configured"
    assert (await world.finder.look("other", [served(model)])).path == "/configured"
    assert world.remote.asked == 0


async def test_what_agrees_is_used_until_nobody_serves_the_model(model: Path) -> None:
    world = World(model, [served(model)])
    async with world.finder:
        await eventually(lambda: world.kind == "found")
        assert await world.is_used()
        world.engines.clear()
        await eventually(lambda: world.kind is None)
        assert not await world.is_used()


async def test_an_engine_that_does_not_answer_is_asked_again_with_growing_pauses(model: Path) -> None:
    played = Played(None)
    world = World(model, [served(model, played)])
    async with world.finder:
        await eventually(lambda: "could not be compared" in world.reason)
        assert not await world.is_used()
        for pause in (module.RETRY_SECONDS, 2 * module.RETRY_SECONDS):
            asked = world.remote.asked
            world.now += pause - 0.1
            await asyncio.sleep(0.02)
            assert world.remote.asked == asked
            world.now += 0.1
            await eventually(partial(world.has_asked_more_than, asked))
            await asyncio.sleep(0.02)
        played.tokenizer = LocalTokenizer.load(model, None)
        world.now += 4 * module.RETRY_SECONDS
        await eventually(lambda: world.kind == "found")


async def test_what_was_refused_is_not_loaded_again_before_something_changes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = folder(tmp_path / "other", tokenizer(bos=True))
    engine = served(model, Played(LocalTokenizer.load(other, None)))
    world = World(model, [engine])
    loads = 0
    load = loader.load

    def counted(*args: Any, **more: Any) -> object:
        nonlocal loads
        loads += 1
        return load(*args, **more)

    monkeypatch.setattr(loader, "load", counted)
    async with world.finder:
        await eventually(lambda: bool(world.refused))
        assert world.refused[str(model)].startswith("a text differs")
        for _ in range(3):
            world.now += module.MAX_RETRY_SECONDS
            await asyncio.sleep(0.02)
        assert loads == 1
        world.engines[:] = [replace(engine, engine=Played(LocalTokenizer.load(model, None)), identity="restarted")]
        world.now += module.MAX_RETRY_SECONDS
        await eventually(lambda: world.kind == "found")
        assert world.refused == {}


async def test_texts_are_tokenized_here_while_chats_cannot_be_compared(model: Path, tmp_path: Path) -> None:
    bare = folder(tmp_path / "bare", tokenizer())  # its engine cannot render chats
    world = World(model, [served(model, Played(LocalTokenizer.load(bare, None)))])
    async with world.finder:
        await eventually(lambda: world.kind == "found")
        source = world.finder.sources["m"]
        assert (source.asks_for_chats, source.checked) == (True, ())
        assert world.reason.startswith("a chat could not be compared with a: ")
        world.engines[:] = [replace(world.engines[0], engine=Played(LocalTokenizer.load(model, None)), identity=1)]
        world.now += module.RETRY_SECONDS
        await eventually(lambda: not world.finder.sources["m"].asks_for_chats)


async def test_a_template_that_joins_parts_differently_is_noticed(model: Path, tmp_path: Path) -> None:
    template = tmp_path / "parts.jinja"
    joined = CHATML.replace("{{- part.text }}", "{{- '' if loop.first else '|' }}{{- part.text }}")
    assert joined != CHATML
    template.write_text(joined)
    world = World(model, [served(model, Played(LocalTokenizer.load(model, str(template))))])
    source = await world.finder.look("m", world.engines)
    assert (source.kind, source.asks_for_chats) == ("found", True)
    assert "a chat with content parts differs" in (source.reason or "")


async def test_a_restarted_engine_is_compared_again(model: Path) -> None:
    engine = served(model)
    world = World(model, [engine])
    async with world.finder:
        await eventually(lambda: world.kind == "found")
        asked = world.remote.asked
        await asyncio.sleep(0.02)
        assert world.remote.asked == asked
        world.engines[:] = [replace(engine, identity="restarted")]
        world.now += module.RETRY_SECONDS
        await eventually(lambda: world.remote.asked > asked)
        assert world.kind == "found"


async def test_token_ids_that_differ_from_what_engines_report_end_the_use_for_good(model: Path) -> None:
    world = World(model, [served(model)])
    async with world.finder:
        await eventually(lambda: world.kind == "found")
        world.distrusted = True
        await eventually(lambda: world.kind == "asked")
        assert not await world.is_used()
        world.distrusted = False
        world.now += module.MAX_RETRY_SECONDS
        await asyncio.sleep(0.05)
        assert world.kind == "asked"
        assert "differed from what the engines report" in world.refused[str(model)]


async def test_an_engine_that_does_not_say_where_its_model_is(model: Path) -> None:
    world = World(model, [replace(served(model), roots=())])
    async with world.finder:
        await eventually(lambda: "does not report where its model is" in world.reason)


async def test_a_folder_without_a_vocabulary_says_so(tmp_path: Path, model: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    world = World(model, [replace(served(model), roots=(str(empty),))])
    async with world.finder:
        await eventually(lambda: "has no vocabulary" in world.reason)


async def test_a_download_is_tried_if_it_is_allowed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, float]] = []

    async def download(repo: str, revision: str | None, *, timeout_seconds: float) -> Path:
        asked.append((repo, revision, timeout_seconds))
        return model

    monkeypatch.setattr(hub, "download", download)
    engine = replace(served(model), roots=("org/model",))
    world = World(model, [engine], TokenizationConfig(find="download", download_seconds=7.0))
    async with world.finder:
        await eventually(lambda: world.kind == "found")
    assert asked == [("org/model", None, 7.0)]
    world = World(model, [engine])
    async with world.finder:
        await eventually(lambda: "org/model is not in" in world.reason)
    assert len(asked) == 1


async def test_downloads_without_the_library_are_refused_at_start(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "can_download", lambda: False)
    with pytest.raises(ConfigError, match=r"matrixinfer-gateway\[hub\]"):
        async with World(model, [], TokenizationConfig(find="download")).finder:
            pass
