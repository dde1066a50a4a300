"""Traces of others, read into turns; and generated ones."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matrixinfer.blocks import TokenIds
from matrixinfer.errors import ConfigError
from matrixinfer.study import formats
from matrixinfer.study.conversations import Message, conversations
from matrixinfer.study.faults import Fault
from matrixinfer.study.generators import GENERATORS, generate
from matrixinfer.study.reading import read
from matrixinfer.study.trace import LetterBlocks, Trace


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(at: float, tokens: int, ids: Sequence[int], **more: object) -> dict[str, object]:
    return {"timestamp": at, "input_length": tokens, "output_length": 20, "hash_ids": list(ids), **more}


def shared(trace: Trace, one: int, other: int) -> int:
    """Blocks that two prompts share."""
    blocks, size = LetterBlocks(), trace.block_size
    turns = [trace.turns[one], trace.turns[other]]
    first, second = (blocks.of(turn.letters)[: turn.prompt // size] for turn in turns)
    return sum(a == b for a, b in zip(first, second, strict=False))


def test_mooncake_lines_have_arrivals_lengths_and_shared_blocks(tmp_path: Path) -> None:
    file = written(tmp_path / "m.jsonl", row(5000, 1600, [7, 8, 9, 10]), row(4000, 1024, [7, 8]), row(9000, 10, [3]))
    trace = formats.mooncake(file)
    assert (trace.name, trace.block_size) == ("m", 512)
    assert [(turn.delay, turn.prompt, turn.reply, turn.after) for turn in trace.turns] == [
        (0.0, 1024, 20, None),
        (1.0, 1600, 20, None),
        (5.0, 10, 20, None),
    ]
    assert shared(trace, 0, 1) == 2
    assert [len(turn.letters) for turn in trace.turns] == [2, 3, 0]
    assert trace.ideal_hit_rate(LetterBlocks()) == pytest.approx(1024 / 2634)


def test_the_block_size_of_hash_ids_is_found_or_asked_for(tmp_path: Path) -> None:
    file = written(tmp_path / "m.jsonl", row(0, 100, range(6)), row(1, 320, range(20)))
    assert formats.mooncake(file).block_size == 16
    odd = written(tmp_path / "odd.jsonl", row(0, 100, range(3)), row(1, 100, range(50)))
    with pytest.raises(formats.TraceError, match="--block-tokens"):
        formats.mooncake(odd)


def test_sessions_of_hashed_requests_also_wait_for_their_answers(tmp_path: Path) -> None:
    rows = [row(0, 64, range(4), session_id="a"), row(700, 64, range(4), session_id="a"), row(800, 64, range(4))]
    turns = formats.mooncake(written(tmp_path / "m.jsonl", *rows)).turns
    assert [(turn.after, turn.delay, turn.not_before) for turn in turns] == [
        (None, 0, 0),
        (0, 0, 0.7),
        (None, 0.8, 0.8),
    ]


COLUMNS = ["t", "agent", "in", "out", "think_time", "api_time", "stop", "model", "hash_rle"]


def agents(tmp_path: Path, *sessions: Sequence[Sequence[Any]]) -> Trace:
    rows = [
        {
            "id": f"s{number}",
            "block_size": 64,
            "tool_tokens": 200,
            "system_tokens": 56,
            "columns": COLUMNS,
            "requests": [
                [t, agent, tokens, out, 0, took, "x", "m", runs] for t, agent, tokens, out, took, runs in session
            ],
        }
        for number, session in enumerate(sessions)
    ]
    return formats.agents(written(tmp_path / "a.jsonl", *rows))


def test_agents_wait_for_what_had_ended_before_them_and_share_tools_and_system_prompt(tmp_path: Path) -> None:
    session = [
        (0.0, "main", 1024, 10, 4.0, [[1, 16]]),
        (6.0, "sub", 512, 10, 100.0, [[900, 8]]),
        (8.0, "main", 1280, 300, None, [[1, 16], [50, 4]]),
        (200.0, "main", 2048, 10, 1.0, [[1, 16], [50, 16]]),
    ]
    trace = agents(tmp_path, session, session)
    turns = trace.turns
    assert [(turn.after, turn.delay) for turn in turns[:4]] == [(None, 0.0), (0, 2.0), (0, 4.0), (1, 60.0)]
    assert turns[4].delay == 30.0  # the next session
    assert shared(trace, 0, 2) == 4
    assert shared(trace, 0, 4) == 1  # 256 tokens of tools and system prompt
    assert shared(trace, 1, 5) == 0


def test_a_reply_is_what_the_agents_next_prompt_continues_with(tmp_path: Path) -> None:
    session = [(0.0, "main", 512, 300, 1.0, [[1, 8]]), (3.0, "main", 1024, 10, 1.0, [[1, 16]])]
    first, second = agents(tmp_path, session).turns
    assert list(first.letters) == list(second.letters[:3])


@pytest.mark.parametrize("runs", [[[1, 10**13]], [["x", 2]], [[1]], None])
def test_sessions_that_cannot_be_read_are_named(tmp_path: Path, runs: Any) -> None:
    with pytest.raises(formats.TraceError, match="session s0"):
        agents(tmp_path, [(0.0, "main", 512, 10, 1.0, runs)])


def test_files_may_be_compressed_and_bad_lines_are_named(tmp_path: Path) -> None:
    plain = written(tmp_path / "m.jsonl", row(0, 64, range(4)))
    packed = tmp_path / "m.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert formats.mooncake(packed) == formats.mooncake(plain)
    plain.write_text('{"timestamp": 1}\n')
    with pytest.raises(formats.TraceError, match=r"m\.jsonl:1: .*input_length"):
        formats.mooncake(plain)
    with pytest.raises(formats.TraceError, match="cannot read"):
        formats.mooncake(tmp_path / "none.jsonl")


def tokenize(messages: Sequence[Message], tools: Sequence[Any] | None) -> TokenIds:
    """One token per letter, with a mark before each message and, unless it is answered, after all."""
    ids = [ord(letter) for message in messages for letter in "\0" + message["content"]]
    return np.array(ids + ([] if messages[-1]["role"] == "assistant" else [0]), np.uint32)


def test_conversations_are_tokenized_and_each_answer_is_a_request(tmp_path: Path) -> None:
    said = [("system", "s" * 100), ("user", "u" * 50), ("assistant", "a" * 40), ("user", "v" * 20), ("assistant", "bb")]
    messages = [{"role": role, "content": text} for role, text in said]
    file = written(tmp_path / "c.jsonl", {"session": "x", "messages": messages})
    first, second = conversations(file, tokenize, think=5.0).turns
    assert (first.prompt, first.reply, second.prompt, second.reply) == (153, 40, 215, 2)
    assert (first.after, second.after) == (None, 0)
    assert list(first.letters) == list(second.letters[:12])  # the answer is a part of the next prompt
    last = conversations(written(tmp_path / "c.jsonl", {"messages": messages, "only_last": True}), tokenize)
    assert [turn.prompt for turn in last.turns] == [215]


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_repeat_themselves_and_follow_their_seed(name: str) -> None:
    assert generate(name, seed=1).turns == generate(name, seed=1).turns
    assert generate(name, seed=1).turns != generate(name, seed=2).turns
    for turn in generate(name, seed=1).turns:
        assert len(turn.letters) == (turn.prompt + turn.reply) // 16


def test_generators_share_what_they_say() -> None:
    groups = generate("shared-prefix:groups=4,requests=8,prefix_tokens=1600", seed=0)
    assert len(groups.turns) == 32
    assert groups.ideal_hit_rate(LetterBlocks()) == pytest.approx(28 * 1600 / sum(turn.prompt for turn in groups.turns))
    chat = generate("multi-round:sessions=2,turns=4", seed=0).turns
    assert list(chat[1].letters[: len(chat[0].letters) - 1]) == list(chat[0].letters[:-1])
    agent = generate("agent-loop:sessions=1,steps=4,sub_agents=3", seed=0).turns
    assert [turn.after for turn in agent].count(2) == 4  # the next step, and three sub-agents


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nothing", "no file `nothing`"),
        ("multi-round:turn=3", "no parameter `turn`"),
        ("multi-round:turns=x", "expected a number"),
        ("shared-prefix:rate=0", "at least 0.001"),
    ],
)
def test_what_a_generator_cannot_do_is_said(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        generate(text, seed=0)


def test_faults_are_read_with_their_defaults() -> None:
    assert Fault.parse("restart@60:2:5") == Fault(kind="restart", at=60, pod=2, value=5)
    assert Fault.parse("slow@0.5") == Fault(kind="slow", at=0.5, pod=0, value=3)
    for text in ("restart", "melt@3", "slow@0:1:0", "small@0:1:2", "restart@-1"):
        with pytest.raises(ConfigError):
            Fault.parse(text)


def test_lengths_and_arrivals_alone_make_new_prompts(tmp_path: Path) -> None:
    file = tmp_path / "azure.csv.gz"
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    rows += ["2023-11-16 18:17:03.9799600,48,16", "2023-11-16 18:17:05.4799600,160,0", "2023-11-16 18:17:06,0,1"]
    file.write_bytes(gzip.compress("\n".join(rows).encode()))
    trace = read(file, tokenizer=None)
    assert [(turn.delay, turn.prompt, turn.reply) for turn in trace.turns] == [(0.0, 48, 16), (1.5, 160, 1)]
    assert shared(trace, 0, 1) == 0
    assert [len(turn.letters) for turn in trace.turns] == [4, 10]
    file.write_bytes(gzip.compress(b"TIMESTAMP,ContextTokens\n2023-11-16 18:17:03,4\n"))
    with pytest.raises(formats.TraceError, match=r"azure\.csv\.gz:2: expected TIMESTAMP, ContextTokens"):
        read(file, tokenizer=None)


def test_a_trace_is_cut_without_breaking_its_order(tmp_path: Path) -> None:
    requests = [
        (float(4 * n), "main", tokens, 10, 1.0, [[1, tokens // 64]]) for n, tokens in enumerate((512, 4096, 640))
    ]
    whole = agents(tmp_path, requests)
    assert [turn.after for turn in whole.turns] == [None, 0, 1]
    short = whole.first(10, most_tokens=1_000)
    assert [(turn.prompt, turn.after) for turn in short.turns] == [(512, None), (640, 0)]
    assert [turn.prompt for turn in whole.first(1, most_tokens=1_000).turns] == [512]
    assert [turn.after for turn in whole.first(10, most_tokens=1_000_000).turns] == [None, 0, 1]
