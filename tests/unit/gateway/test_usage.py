from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.gateway.usage import Tail, Usage, UsageStripper, usage

USAGE = {"prompt_tokens": 7, "total_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
RESPONSES_USAGE = {
    "input_tokens": 7,
    "input_tokens_details": {"cached_tokens": 4, "input_tokens_per_turn": [7]},
    "output_tokens": 2,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 9,
}
ANTHROPIC_USAGE = {"input_tokens": 3, "output_tokens": 2, "cache_read_input_tokens": 4}
LURE = 'say "usage":{"prompt_tokens":1} and \\"usage\\":{'


def compact(data: Any) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode()


def stream(*events: Any) -> bytes:
    return b"".join(b"data: " + compact(event) + b"\n\n" for event in events)


ANSWERS = {
    "chat": compact({"id": "x", "choices": [{"message": {"content": LURE}}], "usage": USAGE, "prompt_logprobs": None}),
    "indented": json.dumps({"choices": [LURE], "usage": USAGE}, indent=2).encode(),
    "embeddings": compact({"data": [{"embedding": [0.5] * 5000}], "usage": {"prompt_tokens": 7, "total_tokens": 7}}),
    "response": compact({"output": [{"text": LURE}], "usage": RESPONSES_USAGE, "user": None}),
    "message": compact({"content": [{"text": LURE}], "usage": ANTHROPIC_USAGE}),
    "chat stream": stream({"delta": LURE, "usage": None}, {"choices": [], "usage": USAGE}) + b"data: [DONE]\n\n",
    "continuous": stream({"usage": {**USAGE, "prompt_tokens": 6}}, {"usage": USAGE}) + b"data: [DONE]\n\n",
    "response stream": b"event: response.completed\n"
    + stream({"response": {"output": [LURE], "usage": RESPONSES_USAGE}, "type": "response.completed"}),
    "message stream": stream({"type": "message_start", "message": {"usage": {"input_tokens": 0}}}, {"delta": LURE})
    + stream({"type": "message_delta", "usage": ANTHROPIC_USAGE}, {"type": "message_stop"}),
}
"""As vLLM 0.32 ends its answers; each prompt has 7 tokens, of which 4 were cached."""


@pytest.mark.parametrize("name", ANSWERS)
def test_the_counts_are_read_from_every_kind_of_answer(name: str) -> None:
    assert usage(ANSWERS[name]) == (
        Usage(prompt=7, cached=None) if name == "embeddings" else Usage(prompt=7, cached=4, output=2)
    )


@pytest.mark.parametrize("name", [name for name in ANSWERS if "stream" in name])
def test_the_end_of_a_long_stream_is_enough_wherever_it_is_cut(name: str) -> None:
    answer = stream(*[{"delta": "x" * 50}] * 2000) + ANSWERS[name]
    for size in (1, 7, 100, 4096, 50_000):
        tail = Tail()
        for start in range(0, len(answer), size):
            tail.add(answer[start : start + size])
        assert usage(bytes(tail)) == Usage(prompt=7, cached=4, output=2)
        assert len(bytes(tail)) < 16 * 1024 + size


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"not json",
        compact({"choices": [{"message": {"content": LURE}}]}),
        compact({"usage": None}),
        compact({"usage": {}}),
        compact({"usage": {"prompt_tokens": "7"}}),
        compact({"usage": {"prompt_tokens": 7.5}}),
        compact({"usage": {"prompt_tokens": -7}}),
        compact({"usage": {"prompt_tokens": 2**31}}),
        compact({"usage": {"prompt_tokens": 7, "completion_tokens": 2**63 - 1}}),
        compact({"usage": {"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": -1}}}),
        b'{"usage":{"prompt_tokens":7',
        b'{"usage":{"prompt_tokens":\xff}}',
        compact({"usage": USAGE, "prompt_token_ids": [1000] * 10_000}),
    ],
)
def test_an_answer_without_a_count_that_can_be_read_has_none(answer: bytes) -> None:
    assert usage(answer) is None


@given(st.text())
def test_generated_text_is_never_taken_for_a_report(text: str) -> None:
    assert usage(compact({"choices": [{"text": text + LURE + text}]})) is None


CHUNKS = [
    b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"\\"usage\\":{} \\"choices\\":[]"}}],"usage":null}\n\n',
    b'data: {"choices":[{"delta":{}}],"usage":{"prompt_tokens":7}}\n\n',
    b": a comment\n\n",
    b"data: [DONE]\n\n",
]
REPORT = b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":7,"total_tokens":9}}\n\n'


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@given(cuts=st.lists(st.integers(0, 400), max_size=30), cut_short=st.booleans())
def test_only_the_chunk_that_reports_usage_is_kept_from_the_client(
    cuts: list[int], cut_short: bool, end: bytes
) -> None:
    stream = b"".join([*CHUNKS[:-1], REPORT, CHUNKS[-1]]).replace(b"\n", end)
    if cut_short:
        stream = stream[:-1]
    bounds = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    assert stripped(stream, bounds) == b"".join(CHUNKS).replace(b"\n", end)[: -1 if cut_short else None]


def stripped(stream: bytes, bounds: list[int]) -> bytes:
    stripper = UsageStripper()
    passed = [stripper.change(stream[start:end]) for start, end in pairwise(bounds)]
    return b"".join([*passed, stripper.rest()])


CHAT_OF_TWO = [
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"index": 1, "delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"index": 1, "delta": {"content": LURE}}], "usage": None},
    {"choices": [{"index": 0, "delta": {"tool_calls": [{"function": {"arguments": LURE}}]}}]},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    {"choices": [{"index": 1, "delta": {}, "finish_reason": "stop"}]},
]
TEXT = [{"choices": [{"index": 0, "text": LURE, "logprobs": None}]}, {"choices": [{"index": 0, "text": ""}]}]
BROKEN = [{"choices": [{"index": 0, "text": "a"}]}, {"error": {"message": LURE, "code": 500}}]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("events", [CHAT_OF_TWO, TEXT, BROKEN], ids=["two choices", "completion", "error"])
def test_it_does_not_matter_at_which_byte_a_stream_is_split(events: list[Any], end: bytes) -> None:
    tail = b"data: [DONE]\n\n"
    whole = (stream(*events, {"choices": [], "usage": USAGE}) + tail).replace(b"\n", end)
    expected = (stream(*events) + tail).replace(b"\n", end)
    size = len(whole)
    assert stripped(whole, list(range(size + 1))) == expected
    for at in range(size):
        assert stripped(whole, [0, at, size]) == expected


def test_a_report_without_its_end_is_kept_from_the_client_too() -> None:
    assert stripped(b"".join(CHUNKS) + REPORT[:-2], [0, 9, 1000]) == b"".join(CHUNKS)


def test_whole_events_are_passed_on_at_once_and_what_is_no_event_does_not_pile_up() -> None:
    stripper = UsageStripper()
    for chunk in CHUNKS:
        assert stripper.change(chunk) == chunk
    assert stripper.change(b"x" * 100_000) == b"x" * 100_000
    assert stripper.rest() == b""
