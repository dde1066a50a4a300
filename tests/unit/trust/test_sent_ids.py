"""Which bodies carry token ids, and which engines are known to make the same answer from them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest
from structlog.testing import capture_logs

from matrixinfer.config import PodConfig
from matrixinfer.pods.engine_kind import EngineFacts
from matrixinfer.pods.pod import Pod, ServedNames
from matrixinfer.prompt import fields
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.trust.sent_ids.bodies import with_ids
from matrixinfer.trust.sent_ids.found import Probed
from matrixinfer.trust.sent_ids.honouring import AGAIN_SECONDS, MOST_ASKED, SOON_SECONDS, Honouring
from tests.waiting import eventually

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
IDS = np.array([5, 70_000, 4_294_967_295], dtype=np.uint32)
MESSAGES = [{"role": "user", "content": "héllo"}]


def made(path: str, engine: Any, body: Any, *, ids: Any = IDS, context: int = 100) -> Any:
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    found = with_ids(path, engine, data, ids, context)
    return None if found is None else msgspec.json.decode(found)


def test_a_chat_keeps_its_messages_and_a_text_is_replaced() -> None:
    chat = {"model": "m", "messages": MESSAGES, "max_tokens": 4, "stream": True, "stop": ["x"]}
    listed = [5, 70_000, 4_294_967_295]
    assert made(CHAT, "vllm", chat) == chat | {"kv_transfer_params": {"prompt_token_ids": listed}}
    assert made(CHAT, "sglang", chat) == chat | {"input_ids": listed}
    text = {"model": "m", "prompt": "héllo", "seed": 1}
    assert made(TEXT, "vllm", text) == made(TEXT, "sglang", text) == {"model": "m", "prompt": listed, "seed": 1}


def test_values_stay_as_the_client_wrote_them() -> None:
    body = rb'{"messages": [{"role":"user","content":"h\u00e9"}],  "temperature": 1.50, "seed":12345678901234567890123}'
    found = with_ids(CHAT, "vllm", body, IDS, 100)
    assert found is not None
    for value in (rb'[{"role":"user","content":"h\u00e9"}]', b"1.50", b"12345678901234567890123"):
        assert value in found


def test_long_arrays_are_whole() -> None:
    ids = np.arange(20_001, dtype=np.uint32)
    assert made(TEXT, "vllm", {"prompt": "x"}, ids=ids, context=30_000)["prompt"] == ids.tolist()


@pytest.mark.parametrize(
    "more",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"structured_outputs": {"regex": "a"}},
        {"reasoning_effort": "low"},
        {"chat_template_kwargs": {}},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
        {"echo": True},
        {"logprobs": True},
        {"prompt_logprobs": 1},
        {"return_token_ids": True},
        {"truncate_prompt_tokens": 5},
        {"kv_transfer_params": {"do_remote_prefill": True}},
        {"input_ids": [1]},
        {"documents": []},
        {"new_field_of_tomorrow": 1},
        {"max_tokens": 98},
        {"max_completion_tokens": 98},
        {"max_tokens": "many"},
    ],
)
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_what_may_depend_on_the_text_is_left_to_the_engine(more: dict[str, Any], engine: str) -> None:
    assert made(CHAT, engine, {"messages": MESSAGES}) is not None
    assert made(CHAT, engine, {"messages": MESSAGES, **more}) is None


def test_fields_that_are_null_do_not_count() -> None:
    assert made(CHAT, "vllm", {"messages": MESSAGES, "tools": None, "max_tokens": None}) is not None


def test_a_body_of_too_many_fields_is_not_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"messages": MESSAGES} | {f"x{n}": None for n in range(5)}
    assert made(CHAT, "vllm", body) is not None
    monkeypatch.setattr(fields, "MOST_FIELDS", 5)
    assert made(CHAT, "vllm", body) is None


def test_a_prompt_at_the_end_of_the_context_is_left_to_the_engine() -> None:
    assert made(TEXT, "vllm", {"prompt": "x", "max_tokens": 2}, context=5) is not None
    assert made(TEXT, "vllm", {"prompt": "x", "max_tokens": 2}, context=4) is None
    assert made(TEXT, "vllm", {"prompt": "x"}, context=4) is not None
    assert made(TEXT, "vllm", {"prompt": "x"}, context=3) is None


def test_other_engines_paths_and_bodies_carry_none() -> None:
    assert made(CHAT, "other", {"messages": MESSAGES}) is None
    assert made(CHAT, None, {"messages": MESSAGES}) is None
    assert made("/v1/messages", "vllm", {"messages": MESSAGES}) is None
    assert made(CHAT, "vllm", b"[1]") is None


@dataclass
class World:
    """Engines that answer when they are told to."""

    now: float = 1000.0
    outcome: Any = "honoured"
    asked: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    metrics: Metrics = field(default_factory=Metrics)

    async def ask(self, pod: Pod, path: str) -> Probed:
        self.asked.append(pod.name)
        await self.gate.wait()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return Probed(path=path, outcome=self.outcome, why=None if self.outcome == "honoured" else "so")

    @asynccontextmanager
    async def run(self) -> AsyncIterator[Honouring]:
        async with Honouring(
            self.ask, lambda: self.now, self.metrics, on_other_run=lambda pod: self.changed.append(pod.name)
        ) as target:
            yield target

    def count(self, result: str) -> float:
        found = self.metrics.registry.get_sample_value("matrixinfer_token_ids_probes_total", {"result": result})
        return found or 0.0


def pod(name: str = "a", **changes: Any) -> Pod:
    made = Pod(config=PodConfig(name=name, url=f"http://{name}"))
    made.served = ServedNames(base_model="m", aliases=frozenset({"m"}), adapters={}, engine="vllm", context_length=100)
    made.healthy = True
    for key, value in changes.items():
        setattr(made, key, value)
    return made


async def until(target: Honouring, engine: Pod) -> None:
    await eventually(lambda: target.honours(engine, CHAT))


async def test_an_engine_is_asked_once_and_used_when_it_has_answered() -> None:
    world, engine = World(), pod()
    async with world.run() as target:
        assert not any(target.honours(engine, CHAT) for _ in range(5))
        await asyncio.sleep(0)
        world.gate.set()
        with capture_logs() as logs:
            await until(target, engine)
        assert world.asked == ["a"]
        world.now += 10 * AGAIN_SECONDS
        assert target.honours(engine, CHAT)
        assert not target.honours(engine, TEXT)  # another question
    assert logs == [{"event": "token_ids_verified", "log_level": "info", "pod": "a", "path": CHAT}]
    assert world.count("honoured") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"restarts": 1},
        {"up_since": 5.0},
        {"facts": EngineFacts(kind="vllm", version="0.33.0")},
        {"served": ServedNames(base_model="m", aliases=frozenset({"m"}), adapters={}, engine="vllm", root="/other")},
    ],
)
async def test_another_run_of_the_engine_is_asked_again(change: dict[str, Any]) -> None:
    world, engine = World(), pod()
    world.gate.set()
    async with world.run() as target:
        await until(target, engine)
        for key, value in change.items():
            setattr(engine, key, value)
        assert not target.honours(engine, CHAT)
        assert world.changed == ["a"]
        assert world.asked == ["a"]
        world.now += SOON_SECONDS
        await until(target, engine)
        assert world.asked == ["a", "a"]


async def test_another_run_is_noticed_once_and_at_any_path() -> None:
    world, engine = World(), pod()
    world.gate.set()
    async with world.run() as target:
        await until(target, engine)
        engine.restarts += 1
        for path in (TEXT, CHAT, CHAT):
            assert not target.honours(engine, path)
            assert world.changed == ["a"]


async def test_an_answer_about_an_earlier_run_does_not_count() -> None:
    world, engine = World(), pod()
    async with world.run() as target:
        target.honours(engine, CHAT)
        await asyncio.sleep(0)
        engine.restarts += 1
        world.gate.set()
        await asyncio.sleep(0.01)
        assert not target.honours(engine, CHAT)
        assert world.count("honoured") == 0


@pytest.mark.parametrize("outcome", ["ignored", "refused", "differs", "failed", RuntimeError("x")])
async def test_an_engine_that_does_not_honour_them_is_asked_again_after_a_while(outcome: Any) -> None:
    world, engine = World(outcome=outcome), pod()
    world.gate.set()
    async with world.run() as target:
        with capture_logs() as logs:
            target.honours(engine, CHAT)
            await eventually(lambda: any(entry["event"] == "token_ids_not_used" for entry in logs))
        assert not any(target.honours(engine, CHAT) for _ in range(5))
        assert world.asked == ["a"]
        world.outcome = "honoured"
        world.now += AGAIN_SECONDS
        await until(target, engine)
        assert world.asked == ["a", "a"]


async def test_a_refusal_of_a_request_ends_it() -> None:
    world, engine = World(), pod()
    world.gate.set()
    async with world.run() as target:
        await until(target, engine)
        target.refused("a", CHAT)
        assert not target.honours(engine, CHAT)
        assert world.count("refused") == 1
        target.refused("unknown", CHAT)


async def test_few_are_asked_at_a_time_and_none_that_is_down_or_sleeps() -> None:
    world = World()
    async with world.run() as target:
        target.honours(pod("down", healthy=False), CHAT)
        for number in range(MOST_ASKED + 3):
            target.honours(pod(f"p{number}"), CHAT)
        await asyncio.sleep(0)
        assert world.asked == [f"p{number}" for number in range(MOST_ASKED)]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_pod_that_has_gone_is_forgotten() -> None:
    world, engine = World(), pod()
    world.gate.set()
    async with world.run() as target:
        await until(target, engine)
        target.forget("a")
        assert not target.honours(engine, CHAT)
