"""Simulated engines with several data-parallel ranks, and with LoRA adapters, over real HTTP and ZMQ."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.model import Timing
from tests.ports import consecutive_ports
from tests.waiting import eventually

from .sim_support import COMPLETIONS, CONFIG, running, subscribed

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9]
RANKS = replace(CONFIG, data_parallel_size=2)
LORA = replace(CONFIG, loras=("french", "terse"))
SLOW = Timing(step=0.05, prefill_token=0, decode_sequence=0)


async def test_each_rank_has_its_own_cache_and_feed(tokenizer: LocalTokenizer) -> None:
    async with (
        running(tokenizer, RANKS) as client,
        subscribed(client.engine, 0) as first,
        subscribed(client.engine, 1) as second,
    ):
        assert [await client.complete(PROMPT, rank=rank) for rank in (1, 1, 0, 1)] == [0, 8, 0, 8]
        await client.complete([7] * 9, rank=1)
        frames = [await first.next(), await second.next(), await second.next()]
        assert [int.from_bytes(frame[1], "big") for frame in frames] == [0, 0, 1]
        await client.complete([8] * 9, rank=1)
        ((stored,), rank) = await second.batch()
        assert (stored["type"], rank) == ("BlockStored", 1)
        assert len(await second.replay(0)) == 3 + 1
        assert len(await first.replay(0)) == 1 + 1
        sources = await client.get("/kv_event_sources")
        ends = [(rank.publisher.endpoint, rank.publisher.replay_endpoint) for rank in client.engine.ranks]
    assert list(sources) == ["0", "1"]
    assert [(source["endpoint"], source["replay_endpoint"]) for source in sources.values()] == [
        (live.replace("127.0.0.1", "*"), replay.replace("127.0.0.1", "*")) for live, replay in ends
    ]
    assert len({end for pair in ends for end in pair}) == 4


async def test_ranks_publish_on_the_ports_after_the_given_ones(tokenizer: LocalTokenizer) -> None:
    port = consecutive_ports(4)
    async with running(tokenizer, replace(RANKS, kv_port=port, replay_port=port + 2)) as client:
        sources = await client.get("/kv_event_sources")
    assert [(source["endpoint"], source["replay_endpoint"]) for source in sources.values()] == [
        (f"tcp://*:{port + rank}", f"tcp://*:{port + 2 + rank}") for rank in (0, 1)
    ]


@pytest.mark.parametrize("rank", ["2", "-1", "99999999999999999999"])
async def test_a_rank_out_of_range_is_refused_in_vllms_words(tokenizer: LocalTokenizer, rank: str) -> None:
    async with running(tokenizer, RANKS) as client:
        answer = await client.post(COMPLETIONS, {"prompt": PROMPT}, status=400, headers={"X-data-parallel-rank": rank})
        assert client.engine.stats.prefix_queries == 0
    assert answer["error"] == {
        "message": f"data_parallel_rank {rank} is out of range [0, 2).",
        "type": "BadRequestError",
        "param": None,
        "code": 400,
    }


async def test_without_a_valid_rank_header_the_engine_takes_turns(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer, RANKS) as client:
        assert [await client.complete(PROMPT) for _ in range(2)] == [0, 0]
        assert [await client.complete(PROMPT, rank=rank) for rank in ("x", "")] == [8, 8]
        assert [rank.stats.prefix_queries for rank in client.engine.ranks] == [18, 18]


async def test_without_a_rank_header_the_least_busy_rank_is_chosen(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer, replace(RANKS, timing=SLOW)) as client:
        first, second = client.engine.ranks
        busy = [asyncio.create_task(client.complete([i] * 9, max_tokens=9, rank=1)) for i in range(3)]
        await eventually(lambda: second.driver.in_flight == 3)
        await asyncio.gather(*(client.complete([i] * 9) for i in range(3, 5)))
        assert (first.stats.generated_tokens, second.driver.in_flight) == (2, 3)
        load = await client.get("/load")
        gauges = [(await client.metrics(rank))["vllm:num_requests_running"] for rank in (0, 1)]
        await asyncio.gather(*busy)
        assert (load, gauges) == ({"server_load": 3}, [0, 3])
        assert [(await client.metrics(rank))["vllm:prefix_cache_queries_total"] for rank in (0, 1)] == [18, 27]
        assert client.engine.stats.prefix_queries == 45


async def test_a_reset_clears_every_rank(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer, RANKS) as client:
        for rank in (0, 1):
            await client.complete(PROMPT, rank=rank)
        assert await client.post("/reset_prefix_cache", {}) == {"success": True}
        assert [await client.complete(PROMPT, rank=rank) for rank in (0, 1)] == [0, 0]


async def test_adapters_are_listed_under_their_model_and_share_no_blocks(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer, LORA) as client, subscribed(client.engine) as feed:
        cards = (await client.get("/v1/models"))["data"]
        found = [await client.complete(PROMPT, model=name) for name in ("sim", "french", "terse", "french", "sim")]
        await client.complete(PROMPT, model="terse", cache_salt="s")
        stored = [event for _ in range(4) for event in await feed.events()]
        answer = await client.post(COMPLETIONS, {"prompt": PROMPT, "model": "french", "max_tokens": 1})
        counted = await client.post("/tokenize", {"model": "terse", "prompt": "The river"})
        await client.post(COMPLETIONS, {"prompt": PROMPT, "model": "greek"}, status=404)
    assert [(card["id"], card["parent"]) for card in cards] == [("sim", None), ("french", "sim"), ("terse", "sim")]
    assert found == [0, 0, 0, 8, 8]
    assert [(event["lora_id"], event["lora_name"], event["extra_keys"]) for event in stored] == [
        (None, None, [None, None]),
        (1, "french", [["french"], ["french"]]),
        (2, "terse", [["terse"], ["terse"]]),
        (2, "terse", [["terse", "s"], ["terse"]]),
    ]
    assert len({block for event in stored for block in event["block_hashes"]}) == 8
    assert answer["model"] == "french"
    assert counted["count"] == len(tokenizer.encode("The river", add_special_tokens=True))


@pytest.mark.parametrize("wrong", [{"data_parallel_size": 0}, {"loras": ("sim",)}, {"loras": ("a", "a")}])
def test_no_ranks_and_names_used_twice_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"at least one rank|the same name twice"):
        replace(CONFIG, **wrong)  # type: ignore[arg-type]
