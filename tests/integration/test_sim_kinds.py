"""Every kind of feed over real HTTP and ZMQ: the frames of an engine predict what its answers report."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from matrixinfer.feedtools.capture import check_capture
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from tests.ports import consecutive_ports

from .sim_support import COMPLETIONS, CONFIG, Client, Feed, Json, command, running, subscribed

VLLM = replace(CONFIG, num_blocks=120)
SGLANG = replace(CONFIG, flavor="sglang", cache_report=True, num_blocks=60)
KINDS = {
    "mla": replace(VLLM, attention=("mla",), num_blocks=60),
    "windows": replace(VLLM, attention=("full", "sliding:10")),
    "coarser windows": replace(VLLM, attention=("full", "sliding:20@8")),
    "dense windows": replace(VLLM, attention=("full", "sliding:10"), dense=True),
    "states": replace(VLLM, attention=("mamba", "full"), max_batched_tokens=16),
    "lookahead": replace(VLLM, speculative="lookahead", num_blocks=60),
    "lookahead and windows": replace(VLLM, attention=("mla", "sliding_mla:10"), speculative="lookahead"),
    "pages": SGLANG,
    "pages of pairs": replace(SGLANG, speculative="pairs"),
}


async def frames_of(feed: Feed, after: int) -> list[Json]:
    """The frames after so many, as rows of a capture."""
    frames = await feed.replay(after)
    return [
        {"kind": "event", "seq": int.from_bytes(frame[2], "big"), "payload_hex": frame[3].hex()}
        for frame in frames[:-1]
    ]


async def converse(client: Client, feeds: list[Feed], requests: int) -> list[list[Json]]:
    """Random requests, each to one rank. Returns a capture of each rank: what it published comes before its request."""
    draw = random.Random(1)
    rows: list[list[Json]] = [[] for _ in feeds]
    prompts = [[draw.randrange(9) for _ in range(draw.randrange(4, 60))] for _ in range(12)]
    for number in range(requests):
        rank = draw.randrange(len(feeds))
        rows[rank] += await frames_of(feeds[rank], sum(row["kind"] == "event" for row in rows[rank]))
        base = draw.choice(prompts)
        prompt = [*base[: draw.randrange(1, len(base) + 1)], *[draw.randrange(9) for _ in range(draw.randrange(9))]]
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": draw.choice([1, 20])}
        if draw.random() < 0.2:
            body["cache_salt"] = draw.choice("ab")
        if len(feeds) > 1:
            body["routed_dp_rank"] = rank
        answer = await client.post(COMPLETIONS, body)
        rows[rank] += [
            {"kind": "request", "label": str(number), "body": body, "prompt_token_ids": prompt},
            {"kind": "response", "label": str(number), "usage": answer["usage"]},
        ]
    return rows


def check_exact(rows: list[Json], requests: int) -> None:
    report = check_capture(rows)
    hits = [row["usage"]["prompt_tokens_details"]["cached_tokens"] for row in rows if row["kind"] == "response"]
    assert report.mismatches == []
    assert report.unsupported == {}
    assert report.requests == len(hits) >= requests
    assert sum(hit > 0 for hit in hits) > requests / 10
    assert [publisher.limits for publisher in report.publishers] == [()]


@pytest.mark.parametrize("kind", KINDS)
async def test_the_events_predict_every_hit(tokenizer: LocalTokenizer, kind: str) -> None:
    async with running(tokenizer, KINDS[kind]) as client, subscribed(client.engine) as feed:
        (rows,) = await converse(client, [feed], 80)
    check_exact(rows, 80)


async def test_the_events_of_each_rank_of_an_sglang_predict_every_hit(tokenizer: LocalTokenizer) -> None:
    port = consecutive_ports(4)
    config = replace(SGLANG, data_parallel_size=2, kv_port=port, replay_port=port + 2, num_blocks=40)
    async with (
        running(tokenizer, config) as client,
        subscribed(client.engine, 0) as first,
        subscribed(client.engine, 1) as second,
    ):
        captures = await converse(client, [first, second], 150)
    for rows in captures:
        check_exact(rows, 50)


async def test_events_say_group_kind_window_and_lookahead(tokenizer: LocalTokenizer) -> None:
    config = replace(CONFIG, attention=("mla", "sliding_mla:6@8"), speculative="lookahead")
    async with running(tokenizer, config) as client, subscribed(client.engine) as feed:
        await client.complete(list(range(17)))
        events, version = await feed.events(), await client.get("/version")
    full, window = events
    assert version == {"version": "0.33.0"}
    assert [event["group_idx"] for event in events] == [0, 1]
    assert (full["kv_cache_spec_kind"], full["block_size"], full["lookahead_token_ids"]) == (
        "mla_attention",
        4,
        [[4], [8], [12], [16]],
    )
    assert "kv_cache_spec_sliding_window" not in full
    assert (window["kv_cache_spec_kind"], window["kv_cache_spec_sliding_window"]) == ("sliding_window_mla", 6)
    # A sparse event: the tokens of two blocks, and the hash of the second, which is that of the fourth fine one.
    assert (window["token_ids"], window["block_hashes"]) == (list(range(16)), full["block_hashes"][3:])
    assert (window["extra_keys"], window["lookahead_token_ids"]) == ([None], [[16]])


async def test_the_command_takes_attention_groups() -> None:
    flags = ["--attention", "full", "sliding:64@32", "--speculative", "lookahead", "--lookahead-tokens", "2"]
    async with (
        command(*flags, "--num-gpu-blocks-override", "91") as ready,
        aiohttp.ClientSession(ready["url"]) as session,
    ):
        async with session.get("/v1/models") as response:
            (card,) = (await response.json())["data"]
        async with session.get("/version") as response:
            assert await response.json() == {"version": "0.33.0"}
    # Thirty-two tokens take two blocks and one.
    assert card["max_model_len"] == 90 // 3 * 32


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attention": ("slidng:4",)}, "slidng:4"),
        ({"attention": ("sliding",)}, "number of tokens"),
        ({"attention": ("full:8",)}, "number of tokens"),
        ({"attention": ()}, "at least one attention group"),
        ({"attention": ("full@8", "mamba@16")}, "same block size"),
        ({"attention": ("chunked:64",), "speculative": "drop"}, "no dropped blocks"),
        ({"speculative": "lookahead", "lookahead_tokens": 5}, "fewer lookahead tokens"),
        ({"attention": ("full", "mamba"), "cpu_blocks": 5}, "with --cpu-blocks"),
        ({"speculative": "drop", "cpu_blocks": 5}, "with --cpu-blocks"),
    ],
)
def test_what_vllm_cannot_do_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimEngineConfig(**{"block_size": 4, **wrong})
