"""A simulated SGLang over real HTTP and ZMQ."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import msgspec
import pytest
import zmq
import zmq.asyncio
from prometheus_client.parser import text_string_to_metric_families

from matrixinfer.cli import main
from matrixinfer.prompt.chat_template import CHATML, ChatTemplate
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.model import Timing
from tests.ports import consecutive_ports
from tests.waiting import DEADLINE_SECONDS

from .sim_support import CHAT, COMPLETIONS, CONFIG, Client, command, running, subscribed

SGLANG = replace(CONFIG, flavor="sglang", cache_report=True)
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9]
MESSAGES = [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "Tell me about rivers."}]
TOOLS = [{"function": {"parameters": {"type": "object"}, "name": "get"}, "type": "function"}]


def two_ranks(**more: Any) -> SimEngineConfig:
    port = consecutive_ports(6)
    return replace(SGLANG, data_parallel_size=2, kv_port=port, replay_port=port + 2, load_port=port + 4, **more)


async def tokens(client: Client, **body: object) -> list[int]:
    answer = await client.post("/tokenize", body)
    assert set(answer) == {"tokens", "count", "max_model_len"}
    assert answer["count"] == len(answer["tokens"])
    ids: list[int] = answer["tokens"]
    return ids


async def test_the_server_describes_its_publishers(tokenizer: LocalTokenizer) -> None:
    config = two_ranks(load_feed=True, loras=("french",))
    async with running(tokenizer, config) as client:
        info, cards = await client.get("/server_info"), (await client.get("/v1/models"))["data"]
        for path in ("/kv_event_sources", "/version", "/load"):
            async with client.session.get(path) as response:
                assert response.status == 404
    assert info["kv_events"] == {
        "publisher": "zmq",
        "endpoint_host": "*",
        "endpoint_port_base": config.kv_port,
        "topic": "kv-events",
        "block_size": 4,
        "dp_size": 2,
        "load_endpoint_port_base": config.load_port,
        "load_topic": "load",
        "replay_endpoint_port_base": config.replay_port,
    }
    assert msgspec.json.decode(info["kv_events_config"])["endpoint"] == f"tcp://*:{config.kv_port}"
    assert (info["version"], info["page_size"], info["dp_size"], info["enable_cache_report"]) == ("0.5.23", 4, 2, True)
    assert [(card["id"], card["parent"], card["owned_by"]) for card in cards] == [
        ("sim", None, "sglang"),
        ("french", "sim", "sglang"),
    ]


async def test_without_a_load_feed_the_server_describes_none(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer, SGLANG) as client:
        info = await client.get("/get_server_info")
    assert not {"load_endpoint_port_base", "load_topic"} & set(info["kv_events"])


async def test_each_rank_publishes_its_own_tree_and_says_first_that_it_is_empty(tokenizer: LocalTokenizer) -> None:
    async with (
        running(tokenizer, two_ranks()) as client,
        subscribed(client.engine, 0) as first,
        subscribed(client.engine, 1) as second,
    ):
        assert [await client.complete(PROMPT, routed_dp_rank=rank) for rank in (1, 0, 1)] == [0, 0, 8]
        assert await client.complete(PROMPT, data_parallel_rank=0) == 8
        assert await client.complete(PROMPT, rank=1, routed_dp_rank=0, cache_salt="s") == 0
        ((stored,), rank), ((salted,), _) = await second.batch(), await second.batch()
        frames = await first.replay(0)
    assert (stored["type"], stored["parent_block_hash"], rank) == ("BlockStored", None, 1)
    assert "extra_keys" not in stored
    assert "cache_salt" not in stored
    assert (salted["cache_salt"], len(salted["block_hashes"])) == ("s", 2)
    assert [frame[1] for frame in frames[:-1]] == [b"kv-events", b"kv-events"]
    assert msgspec.msgpack.decode(frames[0][3])[1:] == [[{"type": "AllBlocksCleared"}], 0]


@pytest.mark.parametrize("rank", [2, -1])
async def test_a_rank_out_of_range_is_refused_in_sglangs_words(tokenizer: LocalTokenizer, rank: int) -> None:
    async with running(tokenizer, two_ranks()) as client:
        answer = await client.post(COMPLETIONS, {"prompt": PROMPT, "routed_dp_rank": rank}, status=400)
    assert answer["object"] == "error"
    assert answer["message"] == f"routed_dp_rank={rank} out of range [0, 2)"


async def test_a_reset_is_published_at_once(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer, SGLANG) as client, subscribed(client.engine) as feed:
        assert await client.complete(PROMPT) == 0
        await feed.next()
        async with client.session.post("/flush_cache") as response:
            assert (response.status, await response.text()) == (200, "Cache flushed.\n")
        assert await feed.events() == [{"type": "AllBlocksCleared"}]
        assert await client.complete(PROMPT) == 0


async def test_cached_tokens_are_reported_only_when_told_to(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer, replace(SGLANG, cache_report=False)) as client:
        answers = [await client.post(COMPLETIONS, {"prompt": PROMPT, "max_tokens": 1}) for _ in range(2)]
        body = {"prompt": PROMPT, "max_tokens": 1, "return_cached_tokens_details": True}
        detailed, (*_, streamed) = await client.post(COMPLETIONS, body), await client.stream(COMPLETIONS, body)
    assert [answer["usage"]["prompt_tokens_details"] for answer in answers] == [None, None]
    assert "sglext" not in answers[0]
    for answer in (detailed, streamed):
        assert answer["sglext"] == {"cached_tokens_details": {"device": 8, "host": 0}}


async def test_a_chat_is_rendered_as_sglang_does(tokenizer: LocalTokenizer) -> None:
    template = ChatTemplate(CHATML)
    shaped = {"type": "function", "function": {"parameters": {"type": "object"}, "name": "get", "description": None}}
    text = template.render(MESSAGES, [shaped | {"defer_loading": None}])
    turns = [*MESSAGES, {"role": "assistant", "content": "They flow"}]
    as_user = template.render([*MESSAGES, {"role": "user", "content": "They flow"}])
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    async with running(tokenizer, SGLANG) as client:
        with_tools = await tokens(client, messages=MESSAGES, tools=TOOLS)
        plain = await tokens(client, messages=MESSAGES)
        without = await tokens(client, messages=MESSAGES, tools=TOOLS, tool_choice="none")
        made_user = await tokens(client, messages=turns)
        continued = await tokens(client, messages=turns, continue_final_message=True)
        as_given = await tokens(client, messages=turns, add_generation_prompt=False)
        in_parts = await tokens(client, messages=parts)
        answer = await client.post(CHAT, {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 1})
        given = await client.post(CHAT, {"messages": MESSAGES, "input_ids": with_tools, "max_tokens": 1})
        await client.post("/tokenize", {}, status=400)
    encode = tokenizer.encode
    assert with_tools == encode(text, add_special_tokens=False).tolist()
    assert plain == without == encode(template.render(MESSAGES), add_special_tokens=False).tolist()
    assert made_user == encode(as_user, add_special_tokens=False).tolist()
    assert continued == plain + encode("They flow", add_special_tokens=False).tolist()
    assert as_given == encode(template.render(turns, add_generation_prompt=False), add_special_tokens=False).tolist()
    assert in_parts == encode(template.render([{"role": "user", "content": "ab"}]), add_special_tokens=False).tolist()
    assert answer["usage"]["prompt_tokens"] == given["usage"]["prompt_tokens"] == len(with_tools)
    assert given["usage"]["prompt_tokens_details"]["cached_tokens"] == (len(with_tools) - 1) // 4 * 4


async def test_texts_are_tokenized_together(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer, SGLANG) as client:
        answer = await client.post("/v1/tokenize", {"prompt": ["The river", "x"]})
    expected = [tokenizer.encode(text, add_special_tokens=True).tolist() for text in ("The river", "x")]
    assert (answer["tokens"], answer["count"]) == (expected, list(map(len, expected)))


async def test_an_adapter_is_named_after_a_colon_or_as_a_path(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer, replace(SGLANG, loras=("french",))) as client, subscribed(client.engine) as feed:
        assert [await client.complete(PROMPT, model=name) for name in ("sim", "anything", "sim:french")] == [0, 8, 0]
        assert await client.complete(PROMPT, lora_path="french") == 8
        stored = [event for _ in range(2) for event in await feed.events()]
        await client.post(COMPLETIONS, {"prompt": PROMPT, "model": "sim:greek"}, status=400)
    assert [event.get("lora_name") for event in stored] == [None, "french"]


async def test_metrics_have_sglangs_names_and_labels(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer, two_ranks()) as client:
        for _ in range(2):
            await client.complete(PROMPT, routed_dp_rank=1)
        async with client.session.get("/metrics") as response:
            families = list(text_string_to_metric_families(await response.text()))
    samples = {
        (sample.name, sample.labels.get("dp_rank"), sample.labels.get("cache_source")): sample
        for family in families
        for sample in family.samples
    }
    gauge = samples["sglang:cache_hit_rate", "1", None]
    assert gauge.value == pytest.approx(8 / 18)
    assert gauge.labels == {
        "model_name": "sim",
        "engine_type": "unified",
        "tp_rank": "0",
        "pp_rank": "0",
        "moe_ep_rank": "0",
        "dp_rank": "1",
    }
    assert samples["sglang:num_running_reqs", "0", None].value == 0
    assert samples["sglang:page_size", "0", None].value == 4
    assert samples["sglang:cached_tokens_total", None, "device"].value == 8
    assert samples["sglang:prompt_tokens_total", None, None].value == 18


@asynccontextmanager
async def load_feed(config: SimEngineConfig, rank: int) -> AsyncIterator[zmq.asyncio.Socket]:
    context = zmq.asyncio.Context()
    try:
        socket = context.socket(zmq.SUB)
        socket.subscribe(b"load")
        socket.connect(f"tcp://{config.host}:{config.load_port + rank}")
        yield socket
    finally:
        context.destroy(linger=0)


async def test_the_load_of_each_rank_is_published_while_it_changes_and_every_second(tokenizer: LocalTokenizer) -> None:
    config = two_ranks(load_feed=True, max_sequences=1, timing=Timing(step=0.2, prefill_token=0, decode_sequence=0))
    async with running(tokenizer, config) as client, load_feed(config, 1) as feed, asyncio.timeout(DEADLINE_SECONDS):
        topic, number, payload = await feed.recv_multipart()  # the heartbeat of an idle rank
        assert (topic, len(number)) == (b"load", 8)
        assert msgspec.msgpack.decode(payload) == ["LoadStat", 0, 0, 0, config.cache_tokens, 1, 0, 0, 1, 0, 0]
        work = [asyncio.create_task(client.complete([n] * 9, 2, routed_dp_rank=1)) for n in range(2)]
        while (stat := msgspec.msgpack.decode((await feed.recv_multipart())[2]))[1:3] != [1, 1]:
            pass
        assert stat[3:9] == [12, config.cache_tokens, 1, 9, 21, 1]
        await asyncio.gather(*work)
        while (stat := msgspec.msgpack.decode((await feed.recv_multipart())[2]))[1:4] != [0, 0, 0]:
            pass
        assert stat[9] == 18
        assert stat[10] == pytest.approx(400_000)


async def test_the_command_runs_an_sglang() -> None:
    port = consecutive_ports(6)
    flags = ["--flavor", "sglang", "--dp-size", "2", "--page-size", "32", "--lora", "c", "--speculative", "pairs"]
    flags += ["--kv-events-port", str(port), "--kv-replay-port", str(port + 2), "--load-publish-endpoint", "auto"]
    async with (
        command(*flags, "--enable-cache-report") as ready,
        aiohttp.ClientSession(ready["url"]) as session,
        session.get("/server_info") as response,
    ):
        info = await response.json()
    events = info["kv_events"]
    # The load feed would overlap with the replays: it comes after them.
    assert (events["endpoint_port_base"], events["load_endpoint_port_base"]) == (port, port + 4)
    assert (events["block_size"], events["dp_size"], info["enable_cache_report"]) == (32, 2, True)
    assert info["speculative_algorithm"] == "EAGLE"


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:5000", "5000", "tcp://*:x"])
def test_a_load_endpoint_that_cannot_be_bound_is_refused(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["engine", "--load-publish-endpoint", endpoint])
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"data_parallel_size": 2}, "--kv-events-port .*consecutive"),
        ({"cpu_blocks": 1}, "no --cpu-blocks"),
        ({"attention": ("mla",)}, "expected --attention full"),
        ({"speculative": "drop"}, "expected --speculative pairs"),
        ({"flavor": "vllm", "load_feed": True}, "expected --flavor sglang"),
        ({"flavor": "vllm", "speculative": "pairs"}, "expected --flavor sglang"),
    ],
)
def test_what_sglang_cannot_do_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SGLANG, **wrong)
