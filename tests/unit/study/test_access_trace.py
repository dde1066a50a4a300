"""The access log as a trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from matrixinfer.study.access_trace import access_log
from matrixinfer.study.formats import TraceError
from matrixinfer.study.reading import read
from matrixinfer.study.trace import LetterBlocks, Trace
from matrixinfer.telemetry.access_entry import AccessEntry, WrittenBlocks


def entry(
    at: float, blocks: Sequence[int] = (), *, seconds: float = 1.0, prompt: int | None = None, **more: object
) -> AccessEntry:
    values: dict[str, object] = {
        "at": at,
        "id": f"r{at}",
        "path": "/v1/x",
        "outcome": "answered",
        "status": 200,
        "model": "m",
        "prompt_tokens": len(blocks) * 16 + 4 if prompt is None else prompt,
        "output_tokens": 30,
        "ms": {"first_byte": 100.0, "total": seconds * 1000},
        "block_size": 16 if blocks else None,
        "blocks": blocks,
    }
    return AccessEntry(**{**values, **more})  # type: ignore[arg-type]


def written(path: Path, *entries: AccessEntry) -> Path:
    """A log with these lines, as one gateway writes them."""
    known = WrittenBlocks()
    for each in entries:
        known.shorten(each)
    path.write_bytes(b"".join(msgspec.json.encode(each) + b"\n" for each in entries))
    return path


def hashes(trace: Trace) -> list[list[int]]:
    blocks = LetterBlocks()
    return [blocks.of(turn.letters) for turn in trace.turns]


def test_arrivals_lengths_and_sessions(tmp_path: Path) -> None:
    file = written(
        tmp_path / "access.jsonl",
        entry(100, [1, 2], seconds=2, session="a"),
        entry(101, [1, 9]),
        entry(105, [1, 2, 3, 4], session="a"),
        entry(105.5, [1, 2, 3, 5], session="a"),
    )
    trace = read(file, tokenizer=None)
    assert (trace.name, trace.block_size) == ("access", 16)
    assert [(turn.delay, turn.after, turn.prompt, turn.reply) for turn in trace.turns] == [
        (0.0, None, 36, 30),
        (1.0, None, 36, 30),
        (3.0, 0, 68, 30),
        (3.5, 0, 68, 30),
    ]


def test_prompts_share_what_they_shared_and_replies_are_what_later_prompts_continue_with(tmp_path: Path) -> None:
    file = written(tmp_path / "a", entry(0, [1, 2]), entry(1, [1, 9]), entry(5, [1, 2, 3, 4]), entry(5.5, [1, 2, 3, 5]))
    first, other, later, sibling = hashes(access_log(file))
    assert first[:1] == other[:1]
    assert first[1] != other[1]
    assert later[:4] == first  # 66 tokens of prompt and reply fill four blocks
    assert sibling[:3] == later[:3]
    assert sibling[3] != later[3]


def test_a_request_that_was_sent_before_the_end_of_another_does_not_continue_it(tmp_path: Path) -> None:
    file = written(tmp_path / "a", entry(0, [1, 2], seconds=9), entry(5, [1, 2, 3, 4]))
    first, later = hashes(access_log(file))
    assert first[:2] == later[:2]
    assert first[2] != later[2]


def test_what_no_pod_computed_and_lines_that_were_broken_off_are_left_out(tmp_path: Path) -> None:
    file = written(
        tmp_path / "a",
        entry(1, [1]),
        entry(2, outcome="refused", status=429),
        entry(3, [1], outcome="client_left", status=499),
        entry(4, outcome="client_left", status=499, ms={"total": 4.0}),
        entry(5, [1], sampled=False, outcome="broken_off", status=502),
    )
    file.write_bytes(file.read_bytes() + b'{"at": 9.0, "id": "x')
    trace = access_log(file)
    assert len(trace.turns) == 2
    assert trace.settings["not_computed"] == 3
    assert trace.settings["unreadable_lines"] == 1


def test_a_log_without_its_beginning_still_shares_within_each_conversation(tmp_path: Path) -> None:
    file = written(tmp_path / "a", entry(0, [1, 2, 3]), entry(2, [1, 2, 3, 4]), entry(4, [1, 2, 3, 4, 5]))
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[1:]))
    trace = access_log(file)
    first, second = hashes(trace)
    assert trace.settings["without_beginning"] == 1
    assert first[:4] == second[:4]


def test_a_prompt_without_blocks_shares_nothing_and_a_reply_without_length_has_the_median(tmp_path: Path) -> None:
    file = written(
        tmp_path / "a",
        entry(0, prompt=64),
        entry(1, prompt=64, output_tokens=10),
        entry(2, prompt=64, output_tokens=None),
        entry(3, prompt=64, output_tokens=None, stream_events=41),
    )
    trace = access_log(file, block_size=16)
    assert len({each[0] for each in hashes(trace)}) == 4
    assert [turn.reply for turn in trace.turns] == [30, 10, 30, 40]
    assert (trace.settings["without_blocks"], trace.settings["without_output"]) == (4, 1)


def test_models_do_not_share_blocks(tmp_path: Path) -> None:
    file = written(
        tmp_path / "a", entry(0, [1, 2]), entry(1, [1, 2, 3], model="other"), entry(2, [1, 2, 4], model="other")
    )
    trace = access_log(file)
    first, second, third = hashes(trace)
    assert first[0] != second[0]
    assert second[:2] == third[:2]
    assert (trace.settings["models"], trace.settings["without_beginning"]) == (2, 0)


def test_blocks_can_be_read_in_larger_ones(tmp_path: Path) -> None:
    file = written(tmp_path / "a", entry(0, [1, 2, 3]), entry(1, [1, 2, 9]))
    trace = access_log(file, block_size=32)
    first, second = hashes(trace)
    assert trace.block_size == 32
    assert first[:1] == second[:1]
    assert first[1] != second[1]
    with pytest.raises(TraceError, match="multiple of 16"):
        access_log(file, block_size=24)


def test_a_log_in_which_nothing_was_computed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no request in it was computed"):
        access_log(written(tmp_path / "a", entry(2, outcome="refused", status=429)))


def test_what_was_recorded_is_kept_to_compare_with(tmp_path: Path) -> None:
    file = written(
        tmp_path / "a",
        entry(0, [1], prompt=100, cached_tokens=0, stream_events=9),
        entry(1, [1], prompt=100, cached_tokens=80, stream_events=9, ms={"first_byte": 300.0, "total": 900.0}),
        entry(2, [1], prompt=500, ms={"first_byte": 9000.0, "total": 9000.0}),
    )
    recorded = {"hit_rate": 0.4, "ttft_mean_s": 0.2, "ttft_p90_s": 0.3}
    assert access_log(file).settings["recorded"] == recorded
    file = written(tmp_path / "b", entry(0, [1]))
    assert access_log(file).settings["recorded"] == dict.fromkeys(recorded)
