"""A simulated engine over real HTTP and ZMQ."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from dataclasses import replace

import aiohttp
import msgspec
import pytest
import zmq
import zmq.asyncio

from matrixinfer.prompt.base import Chat
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.model import Timing
from matrixinfer.sim.server import SimEngine
from tests.waiting import DEADLINE_SECONDS, eventually

from .sim_support import CHAT, COMPLETIONS, CONFIG, END, Json, running, subscribed

SLOW = Timing(step=0.02, prefill_token=0, decode_sequence=0)
MESSAGES = [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "Tell me about rivers."}]


async def test_a_chat_is_answered_in_openais_shape(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer) as client:
        answer = await client.post(CHAT, {"messages": MESSAGES, "max_tokens": 8}, request_id="abc")
    (choice,) = answer["choices"]
    count = len(tokenizer.encode(tokenizer.render(Chat(messages=MESSAGES)), add_special_tokens=False))
    assert (answer["id"], answer["object"], answer["model"]) == ("chatcmpl-abc", "chat.completion", "sim")
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    assert len(tokenizer.encode(choice["message"]["content"], add_special_tokens=False)) == 8
    assert answer["usage"] == {
        "prompt_tokens": count,
        "completion_tokens": 8,
        "total_tokens": count + 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_the_next_turn_hits_the_whole_previous_turn(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer) as client:
        first = await client.post(CHAT, {"messages": MESSAGES, "max_tokens": 30})
        turn = [*MESSAGES, first["choices"][0]["message"], {"role": "user", "content": "Go on."}]
        second = await client.post(CHAT, {"messages": turn, "max_tokens": 1})
    computed = first["usage"]["total_tokens"] - 1
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == computed // 4 * 4


async def test_a_streamed_chat_has_a_chunk_per_token_and_then_the_usage(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer) as client:
        body = {"messages": MESSAGES, "max_tokens": 5}
        whole = await client.post(CHAT, body)
        chunks = await client.stream(CHAT, {**body, "stream_options": {"include_usage": True}})
    role, *tokens, last = chunks
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len(tokens) == 5
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in tokens)
    assert text == whole["choices"][0]["message"]["content"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in tokens] == [None] * 4 + ["length"]
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == (whole["usage"]["prompt_tokens"] - 1) // 4 * 4


async def test_a_streamed_completion_without_max_tokens_ends(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer) as client:
        chunks = await client.stream(COMPLETIONS, {"prompt": "The river"})
    assert len(chunks) == CONFIG.default_max_tokens
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert not any("usage" in chunk for chunk in chunks)


async def test_headers_of_a_stream_come_before_its_first_token(tokenizer: LocalTokenizer) -> None:
    slow = replace(CONFIG, timing=Timing(step=0.3, prefill_token=0, decode_sequence=0))
    async with running(tokenizer, slow) as client:
        clock = asyncio.get_running_loop().time
        start = clock()
        body = {"model": "sim", "prompt": "The river", "max_tokens": 1, "stream": True}
        async with client.session.post(COMPLETIONS, json=body) as response:
            headers = clock() - start
            await response.read()
            assert headers < 0.25 <= clock() - start


async def test_time_passes_as_the_model_says(tokenizer: LocalTokenizer) -> None:
    timing = Timing(step=0.001, prefill_token=0.002, decode_sequence=0)
    async with running(tokenizer, replace(CONFIG, timing=timing)) as client:
        clock = asyncio.get_running_loop().time
        took = []
        for _ in range(2):
            start = clock()
            await client.complete(list(range(101)))
            took.append(clock() - start)
    assert 0.203 <= took[0] < 0.4
    assert took[1] < 0.1


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (COMPLETIONS, {"prompt": "x", "model": "other"}, 404, "model"),
        (COMPLETIONS, {}, 400, "prompt"),
        (COMPLETIONS, {"prompt": ""}, 400, "prompt"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 796}, 400, "input_tokens"),
        (COMPLETIONS, {"prompt": [7] * 796}, 400, "input_tokens"),
        (COMPLETIONS, {"prompt": "x", "n": 0}, 400, "n"),
        (CHAT, {"messages": MESSAGES, "chat_template": "{{ 1 }}"}, 400, None),
        ("/tokenize", {"prompt": ["x", "y"]}, 400, None),
        ("/tokenize", {}, 400, None),
    ],
)
async def test_a_request_that_cannot_be_served_is_refused_in_openais_shape(
    tokenizer: LocalTokenizer, path: str, body: Json, status: int, param: str | None
) -> None:
    async with running(tokenizer) as client:
        answer = await client.post(path, body, status=status)
        assert client.engine.stats.waiting == client.engine.stats.running == 0
    error = answer["error"]
    kind = {400: "BadRequestError", 404: "NotFoundError"}[status]
    assert (error["code"], error["type"], error["param"]) == (status, kind, param)
    assert error["message"]


async def test_a_request_may_fill_the_context_exactly(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer) as client:
        answer = await client.post(COMPLETIONS, {"prompt": [7] * 790, "max_tokens": 6})
        bounded = await client.post(COMPLETIONS, {"prompt": [7] * 790})
    assert answer["usage"]["total_tokens"] == bounded["usage"]["total_tokens"] == 199 * 4


async def test_events_report_stored_blocks_and_a_replay_repeats_them(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer) as client, subscribed(client.engine) as feed:
        await client.complete([1, 2, 3, 4, 5, 6, 7, 8], max_tokens=1)
        await client.complete([1, 2, 3, 4, 5, 6, 7, 8], max_tokens=1, cache_salt="s")
        live = [await feed.next(), await feed.next()]
        replayed = await feed.replay(0)
        assert [frames[1:] for frames in replayed[:-1]] == live
        assert await feed.replay(1) == replayed[1:]
        assert await feed.replay(2) == [[b"", b"", END, b""]]
    assert [frames[:2] for frames in live] == [[b"kv-events", bytes(8)], [b"kv-events", bytes(7) + b"\x01"]]
    _, (plain,), rank = msgspec.msgpack.decode(live[0][2])
    _, (salted,), _ = msgspec.msgpack.decode(live[1][2])
    assert rank == 0
    assert (plain["type"], plain["token_ids"], plain["block_size"]) == ("BlockStored", [1, 2, 3, 4, 5, 6, 7, 8], 4)
    assert salted["extra_keys"] == [["s"], None]
    assert not set(plain["block_hashes"]) & set(salted["block_hashes"])


async def test_a_replay_request_without_its_empty_frame_gets_no_answer(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer) as client:
        context = zmq.asyncio.Context()
        dealer = context.socket(zmq.DEALER)
        try:
            dealer.connect(client.engine.replay_endpoint)
            await dealer.send_multipart([bytes(8)])
            await dealer.send_multipart([b"", b"short"])
            assert not await dealer.poll(200)
            await dealer.send_multipart([b"", bytes(8)])
            assert await asyncio.wait_for(dealer.recv_multipart(), DEADLINE_SECONDS) == [b"", b"", END, b""]
        finally:
            context.destroy(linger=0)


async def test_a_hit_publishes_nothing(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer) as client, subscribed(client.engine) as feed:
        assert await client.complete([1, 2, 3, 4, 5]) == 0
        await feed.next()
        assert await client.complete([1, 2, 3, 4, 5]) == 4
        assert await feed.is_silent()


async def test_a_reset_is_published_first_in_the_next_step(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer) as client, subscribed(client.engine) as feed:
        await client.complete([1, 2, 3, 4, 5])
        await feed.next()
        assert await client.post("/reset_prefix_cache", {}) == {"success": True}
        assert await feed.is_silent()
        assert await client.complete([1, 2, 3, 4, 5]) == 0
        assert [event["type"] for event in await feed.events()] == ["AllBlocksCleared", "BlockStored"]


async def test_a_disconnected_client_aborts_its_request_and_its_blocks_stay_cached(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer, replace(CONFIG, timing=SLOW)) as client:
        body = {"model": "sim", "prompt": [1, 2, 3, 4, 5], "max_tokens": 500, "stream": True}
        async with client.session.post(COMPLETIONS, json=body) as response:
            await response.content.readuntil(b"\n\n")
            assert client.engine.stats.running == 1
            response.close()
        await eventually(lambda: client.engine.stats.running == 0)
        assert client.engine.stats.cache_usage == 0
        assert client.engine.stats.generated_tokens < 50
        assert await client.complete([1, 2, 3, 4, 5]) == 4


async def test_tokenize_returns_the_ids_that_the_engine_caches(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer) as client, subscribed(client.engine) as feed:
        answer = await client.post("/tokenize", {"messages": MESSAGES})
        await client.post(CHAT, {"messages": MESSAGES, "max_tokens": 1})
        (stored,) = await feed.events()
        count = answer["count"]
        assert answer["tokens"][: count // 4 * 4] == stored["token_ids"]
        text = await client.post("/tokenize", {"prompt": "The river"})
    assert answer == {"count": count, "max_model_len": 796, "tokens": answer["tokens"], "token_strs": None}
    assert text["tokens"] == tokenizer.encode("The river", add_special_tokens=True).tolist()


async def test_the_engine_says_what_it_serves_and_where_its_events_are(tokenizer: LocalTokenizer) -> None:
    config = replace(CONFIG, served_model_names=("a", "b"), max_model_len=100)
    async with running(tokenizer, config) as client:
        async with client.session.get("/v1/models") as response:
            models = (await response.json())["data"]
        async with client.session.get("/kv_event_sources") as response:
            source = (await response.json())["0"]
        async with client.session.get("/health") as response:
            assert response.status == 200
        engine = client.engine
        assert source["endpoint"] == engine.kv_endpoint.replace("127.0.0.1", "*")
        assert source["replay_endpoint"] == engine.replay_endpoint.replace("127.0.0.1", "*")
        await client.post(COMPLETIONS, {"model": "b", "prompt": "x", "max_tokens": 1})
    assert [(model["id"], model["parent"], model["max_model_len"]) for model in models] == [
        ("a", None, 100),
        ("b", None, 100),
    ]


async def test_metrics_have_vllms_names(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer, replace(CONFIG, timing=SLOW)) as client:
        await client.complete([1, 2, 3, 4, 5])
        busy = asyncio.create_task(client.complete([1, 2, 3, 4, 5, 6], max_tokens=10))
        await eventually(lambda: client.engine.stats.generated_tokens > 2)
        metrics = await client.metrics()
        async with client.session.get("/load") as response:
            assert await response.json() == {"server_load": 1}
        await busy
        idle = await client.metrics()
    assert metrics["vllm:num_requests_running"] == 1
    assert metrics["vllm:num_requests_waiting"] == 0
    assert 0 < metrics["vllm:kv_cache_usage_perc"] < 0.1
    assert metrics["vllm:cache_config_info"] == 1
    assert (metrics["vllm:prefix_cache_queries_total"], metrics["vllm:prefix_cache_hits_total"]) == (11, 4)
    assert idle["vllm:time_to_first_token_seconds_count"] == 2
    assert idle["vllm:generation_tokens_total"] == 11
    assert idle["vllm:kv_cache_usage_perc"] == idle["vllm:num_requests_running"] == 0


async def test_a_taken_port_is_an_oserror_and_leaves_nothing_open(tokenizer: LocalTokenizer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        await SimEngine(replace(CONFIG, port=taken.getsockname()[1]), tokenizer).__aenter__()


async def test_an_error_in_the_callers_block_reaches_the_caller_as_it_is(tokenizer: LocalTokenizer) -> None:
    with pytest.raises(KeyError):
        async with SimEngine(CONFIG, tokenizer):
            raise KeyError


async def test_the_command_prints_its_endpoints_and_stops_on_sigterm() -> None:
    script = (
        "import argparse, sys; from matrixinfer.cli import engine; parser = argparse.ArgumentParser();"
        "engine.add_parser(parser.add_subparsers()); args = parser.parse_args(sys.argv[1:]); sys.exit(args.run(args))"
    )
    flags = ["--json", "--port", "0", "--served-model-name", "a", "b", "--block-size", "32", "--max-model-len", "500"]
    flags += ["--lora", "c", "--lora", "d", "--data-parallel-size", "2", "--kv-buffer-batches", "7", "--seed", "3"]
    flags += ["--cpu-blocks", "9", "--lazy-offload", "--load-seconds", "0.001", "--lose-frames", "0.5"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, "engine", *flags, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        ready = msgspec.json.decode(await asyncio.wait_for(process.stdout.readline(), DEADLINE_SECONDS))
        async with aiohttp.ClientSession(ready["url"]) as session:
            async with session.get("/v1/models") as response:
                models = (await response.json())["data"]
            async with session.get("/kv_event_sources") as response:
                sources = await response.json()
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), DEADLINE_SECONDS) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    named = [("a", 500), ("b", 500), ("c", None), ("d", None)]
    assert [(model["id"], model["max_model_len"]) for model in models] == named
    assert ready["model"] == "a"
    assert ready["kv_events"].endswith(sources["0"]["endpoint"].removeprefix("tcp://*"))
    assert [source["buffer_steps"] for source in sources.values()] == [7, 7]


@pytest.mark.parametrize("sizes", [{"max_model_len": 145}, {"block_size": 0}, {"num_blocks": 1}, {"max_sequences": 0}])
def test_sizes_out_of_range_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"max-model-len|of at least 1"):
        SimEngineConfig(**{"num_blocks": 10, "block_size": 16, **sizes})  # type: ignore[arg-type]
