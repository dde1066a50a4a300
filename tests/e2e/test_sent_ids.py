"""Engines get the token ids that the gateway has made, where that has been shown to change nothing."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from matrixinfer.blocks import TokenIds
from matrixinfer.config import DriftConfig, TokenizationConfig, TracingConfig
from matrixinfer.errors import InvalidRequest
from matrixinfer.gateway import token_ids
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.handlers import EngineHandlers, EnginePrompt
from matrixinfer.sim.model import Timing
from matrixinfer.sim.server import SimEngine
from matrixinfer.sim.vllm_handlers import VllmHandlers
from matrixinfer.trust import parity, sampling
from matrixinfer.trust.parity import RUN
from matrixinfer.trust.sent_ids.bodies import with_ids
from tests.collector import Collector, attributes, collector
from tests.virtual_time import VirtualTimeLoop
from tests.waiting import eventually

from .fleet import TOKENIZER, Fleet, gateway

pytestmark = pytest.mark.virtual_time

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
VLLM = SimEngineConfig(
    model="m", block_size=16, num_blocks=5_000, timing=Timing(step=0.0005, prefill_token=0, decode_sequence=0)
)
SGLANG = replace(VLLM, flavor="sglang", cache_report=True)
GRACE = 0.1
SENDS = TokenizationConfig(send_ids="when_verified")
Json = dict[str, Any]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_GRACE_SECONDS", GRACE)


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What engines have tokenized: chats and texts."""
    found: list[str] = []
    encode = EngineHandlers._encode  # noqa: SLF001 - there is nothing else to see it by

    def seen(self: EngineHandlers, chat: Any, text: str | None, *, add_special_tokens: bool) -> TokenIds:
        found.append("text" if chat is None else "chat")
        return encode(self, chat, text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(EngineHandlers, "_encode", seen)
    return found


@dataclass(frozen=True)
class Sender:
    """A gateway that is to send token ids."""

    fleet: Fleet
    path: str
    unheld: list[str]
    """Not empty while the clock does not wait for the engines' events."""

    def body(self, number: object, **more: Any) -> Json:
        text = f"{number}: " + "The river is long and old, and it flows to the sea. " * 20
        prompt = {"prompt": text} if self.path == COMPLETIONS else {"messages": [{"role": "user", "content": text}]}
        return {"model": "m", "max_tokens": 4, **prompt, **more}

    async def sent_ids(self, number: object, **more: Any) -> bool:
        """Send a request, and say whether the engine got token ids. Its answer must be that of the engine itself."""
        body = self.body(number, **more)
        answer, pod = await self.fleet.post(self.path, body)
        direct, _ = await self.fleet.post(
            self.path, body, to=self.fleet.engines[int(str(pod).partition("@")[0][-1])].url
        )
        assert answer["choices"] == direct["choices"]
        assert answer["usage"]["prompt_tokens"] == direct["usage"]["prompt_tokens"]
        record = next(self.fleet.service.state.decisions.newest())
        await asyncio.sleep(2 * GRACE)
        self.fleet.service.state.parity.sampling.settle()
        return record.sent_ids

    async def until_sent(self) -> int:
        """How many requests went as they came before the first one that carried token ids."""
        for number in range(200):
            if await self.sent_ids(f"first {number}"):
                return number
        raise AssertionError("no request carried token ids")

    async def metric(self, series: str) -> float:
        return await self.fleet.metric(series)


@asynccontextmanager
async def sending(
    loop: VirtualTimeLoop,
    tokenizer: LocalTokenizer,
    engine: SimEngineConfig,
    *,
    path: str = CHAT,
    pods: int = 1,
    settings: TokenizationConfig = SENDS,
    chat_template: str = "chatml",
    drift: DriftConfig | None = None,
    tracing: TracingConfig | None = None,
) -> AsyncIterator[Sender]:
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(SimEngine(engine, tokenizer)) for _ in range(pods)]
        fleet = await stack.enter_async_context(
            gateway(engines, tokenization=settings, chat_template=chat_template, drift=drift, tracing=tracing)
        )
        await eventually(fleet.is_settled)
        unheld: list[str] = []
        with loop.hold_while(lambda: not unheld and not fleet.is_settled()):
            yield Sender(fleet, path, unheld)


@pytest.mark.parametrize("engine", [VLLM, SGLANG], ids=["vllm", "sglang"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS], ids=["chat", "text"])
async def test_plain_prompts_carry_ids_once_the_engine_is_known_to_honour_them(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer, engine: SimEngineConfig, path: str
) -> None:
    async with sending(loop, tokenizer, engine, path=path) as target:
        before = await target.until_sent()
        assert before >= RUN, "the engine's events must have shown the ids first"
        async with target.fleet.session.get(f"{target.fleet.service.gateway.admin_url}/debug/tokenizers") as response:
            shown = (await response.json())["tokenizers"]["m"]
        assert shown["sent_ids"] == {"pod-0": {path: {"result": "honoured", "reason": None}}}
        assert shown["classes"]["text" if path == COMPLETIONS else "chat"]["proven_at"] == ["pod-0"]
        results = [await target.sent_ids(f"later {number}") for number in range(40)]
        assert await target.metric('matrixinfer_token_ids_probes_total{result="honoured"}') == 1
        sent = await target.metric('matrixinfer_token_ids_sent_total{pod="pod-0"}')
    assert 30 <= sum(results) < 40, "some go as they came, to prove the ids"
    assert sent == sum(results) + 1


async def test_the_engine_tokenizes_only_what_comes_without_ids(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer, tokenized: list[str]
) -> None:
    async with sending(loop, tokenizer, VLLM) as target:
        await target.until_sent()
        before, sent = len(tokenized), 0
        for number in range(20):
            sent += await target.sent_ids(f"later {number}")
    assert len(tokenized) - before == 20 + (20 - sent)  # each is also sent to the engine directly, as it came


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "The river is long. " * 40}]}]},
        {"reasoning_effort": "low"},
        {"logprobs": True},
        {"truncate_prompt_tokens": 20},
    ],
    ids=["tools", "parts", "reasoning", "logprobs", "truncated"],
)
async def test_other_requests_go_as_they_came(loop: VirtualTimeLoop, tokenizer: LocalTokenizer, more: Json) -> None:
    async with sending(loop, tokenizer, VLLM) as target:
        await target.until_sent()
        body = target.body("other", **more)
        for _ in range(3):
            await target.fleet.post(CHAT, body)
            assert not next(target.fleet.service.state.decisions.newest()).sent_ids


@pytest.mark.parametrize("engine", [VLLM, SGLANG], ids=["vllm", "sglang"])
async def test_an_engine_that_ignores_ids_never_gets_any(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer, engine: SimEngineConfig
) -> None:
    async with sending(loop, tokenizer, replace(engine, takes_ids=False)) as target:
        assert not any([await target.sent_ids(number) for number in range(40)])
        assert await target.metric('matrixinfer_token_ids_probes_total{result="ignored"}') == 1


async def test_ids_that_differ_from_the_engines_are_never_sent(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer, tmp_path: Any
) -> None:
    template = tmp_path / "other.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}!{% endfor %}", encoding="utf-8")
    async with sending(loop, tokenizer, VLLM, chat_template=str(template)) as target:
        assert not any([await target.sent_ids(number) for number in range(30)])
        assert await target.metric('matrixinfer_token_ids_probes_total{result="honoured"}') == 0


async def test_an_engine_that_has_restarted_is_asked_again(loop: VirtualTimeLoop, tokenizer: LocalTokenizer) -> None:
    async with sending(loop, tokenizer, VLLM) as target:
        await target.until_sent()
        (pod,) = target.fleet.service.engines.registry.pods
        target.unheld.append("what a new engine has published is known only with its first event")
        target.fleet.engines[0].restart()
        await eventually(lambda: pod.restarts == 1)
        assert not await target.sent_ids("after")
        await eventually(target.fleet.is_settled)
        target.unheld.clear()
        await asyncio.sleep(60)
        await target.until_sent()
        assert await target.metric('matrixinfer_token_ids_probes_total{result="honoured"}') == 2


async def test_an_engine_that_refuses_a_request_gets_it_as_it_came_and_no_more_ids(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        collector() as kept,
        sending(
            loop, tokenizer, VLLM, tracing=TracingConfig(enabled=True, endpoint=kept.url, interval_seconds=0.05)
        ) as target,
    ):
        await target.until_sent()
        read = VllmHandlers.read

        def refusing(self: VllmHandlers, prompt: Prompt, body: bytes) -> EnginePrompt:
            if b"prompt_token_ids" in body:
                raise InvalidRequest("no ids today", param="kv_transfer_params")
            return read(self, prompt, body)

        monkeypatch.setattr(VllmHandlers, "read", refusing)
        assert not any([await target.sent_ids(f"later {number}") for number in range(10)])
        assert await target.metric('matrixinfer_token_ids_probes_total{result="refused"}') == 1

        async def is_exported() -> bool:
            await asyncio.to_thread(time.sleep, 0.02)  # a thread exports, in time that this clock does not know
            return any(attributes(each).get("error.type") == "400" for each in kept.spans)

        await eventually(is_exported)
    (refused,) = [each for each in kept.named("chat m") if attributes(each).get("error.type") == "400"]
    assert kept.below(span_of(kept, refused)).count("chat m") == 2


def span_of(kept: Collector, child: Span) -> Span:
    return next(each for each in kept.spans if each.span_id == child.parent_span_id)


async def test_a_malformed_request_gets_the_engines_own_words_and_proves_nothing(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer
) -> None:
    async with sending(loop, tokenizer, VLLM) as target:
        await target.until_sent()
        for number in range(5):
            body = target.body(f"malformed {number}", n=1000)
            answers = []
            for url in (target.fleet.url, target.fleet.engines[0].url):
                async with target.fleet.session.post(url + CHAT, json=body) as response:
                    answers.append((response.status, await response.json()))
            assert answers[0] == answers[1]
            assert answers[0][0] == 400
        assert any([await target.sent_ids(f"later {number}") for number in range(3)])
        assert await target.metric('matrixinfer_token_ids_probes_total{result="refused"}') == 0


async def test_ids_of_another_tokenizer_must_be_shown_again(loop: VirtualTimeLoop, tokenizer: LocalTokenizer) -> None:
    async with sending(loop, tokenizer, VLLM) as target:
        await target.until_sent()
        tokenizers = target.fleet.service._finder._tokenizers  # noqa: SLF001 - it finds another one in its own time
        tokenizers.use("m", LocalTokenizer.load(TOKENIZER, "chatml"))
        results = [await target.sent_ids(f"later {number}") for number in range(8)]
    assert not any(results[:RUN])
    assert any(results)


async def test_each_pod_must_show_the_ids_itself(loop: VirtualTimeLoop, tokenizer: LocalTokenizer) -> None:
    async with sending(loop, tokenizer, VLLM, pods=2) as target:
        for number in range(60):
            await target.sent_ids(number)
        for name in ("pod-0", "pod-1"):
            assert await target.metric(f'matrixinfer_token_ids_sent_total{{pod="{name}"}}') > 0
        assert await target.metric('matrixinfer_token_ids_probes_total{result="honoured"}') == 2


async def test_each_rank_must_show_the_ids_itself(loop: VirtualTimeLoop, tokenizer: LocalTokenizer) -> None:
    async with sending(loop, tokenizer, replace(VLLM, data_parallel_size=2)) as target:
        for number in range(60):
            await target.sent_ids(number)
        for name in ("pod-0@dp0", "pod-0@dp1"):
            assert await target.metric(f'matrixinfer_token_ids_sent_total{{pod="{name}"}}') > 0


async def test_streams_carry_ids_and_all_else_that_the_gateway_adds(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer
) -> None:
    engine = replace(VLLM, served_model_names=("m", "other"))
    async with sending(loop, tokenizer, engine, drift=DriftConfig(inject_usage=True)) as target:
        await target.until_sent()
        body = target.body("streamed", stream=True, model="other")
        async with target.fleet.session.post(target.fleet.engines[0].url + CHAT, json=body) as response:
            direct = await response.text()
        async with target.fleet.session.post(target.fleet.url + CHAT, json=body) as response:
            streamed = await response.text()
        record = next(target.fleet.service.state.decisions.newest())
    assert record.sent_ids
    assert record.counted is not None, "the usage report that the gateway asks for was read"
    assert [line["choices"] for line in events(streamed)] == [line["choices"] for line in events(direct)]
    assert {line["model"] for line in events(streamed)} == {"other"}


def events(stream: str) -> list[Json]:
    return [json.loads(part.removeprefix("data: ")) for part in stream.split("\n\n") if part[6:7] == "{"]


async def test_large_bodies_are_made_in_a_thread(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_ids, "LARGE_BYTES", 10)
    threads: set[str] = set()

    def seen(*arguments: Any) -> bytes | None:
        threads.add(threading.current_thread().name)
        return with_ids(*arguments)

    monkeypatch.setattr(token_ids, "with_ids", seen)
    async with sending(loop, tokenizer, VLLM) as target:
        await target.until_sent()
    assert threading.current_thread().name not in threads
    assert threads


async def test_where_there_is_no_room_for_ids_the_request_goes_as_it_came(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sending(loop, tokenizer, VLLM) as target:
        await target.until_sent()
        monkeypatch.setattr(token_ids, "_BYTES_PER_TOKEN", 10**9)
        assert not any([await target.sent_ids(f"later {number}") for number in range(5)])


async def test_nothing_is_sent_or_asked_by_default(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer, tokenized: list[str]
) -> None:
    assert TokenizationConfig().send_ids == "never"
    async with sending(loop, tokenizer, VLLM, settings=TokenizationConfig()) as target:
        assert not any([await target.sent_ids(number) for number in range(20)])
        assert tokenized == ["chat"] * 40


async def test_the_canary_goes_on(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "SAMPLED_EVERY", 4)
    async with sending(loop, tokenizer, VLLM) as target:
        await target.until_sent()
        series = 'matrixinfer_tokenizer_parity_total{check="events",class="chat",model="m",result="agreed"}'
        usage = series.replace("events", "usage")
        before = await target.metric(series), await target.metric(usage)
        results = [await target.sent_ids(f"later {number}") for number in range(20)]
        after = await target.metric(series), await target.metric(usage)
    plain = len(results) - sum(results)
    assert 4 <= plain <= 6
    assert after[1] - before[1] == plain, "an engine that was given the ids counts them, which proves nothing"
    assert after[0] - before[0] >= plain - 1
