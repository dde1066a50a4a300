import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from matrixinfer.cli import main
from matrixinfer.kvevents.capture import CaptureError, CaptureReport, Mismatch, check_capture
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.wire import AllBlocksCleared, Event

from .support import CLEARED, frame, removed, stored

CAPTURES = Path(__file__).parents[2] / "data" / "captures"
ORACLES = ["oracle-bs16", "oracle-bs32"]
PROMPT = list(range(40))


def recorded(name: str) -> list[dict[str, Any]]:
    with gzip.open(CAPTURES / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def event(seq: int, *events: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"kind": "event", "seq": seq, "payload_hex": frame(*events).hex(), **fields}


def asked(label: str, tokens: list[int], cached: Any, **body: Any) -> list[dict[str, Any]]:
    """A request and what the engine said of it."""
    return [
        {"kind": "request", "label": label, "body": {"model": "tiny", **body}, "prompt_token_ids": tokens},
        {"kind": "response", "label": label, "usage": {"prompt_tokens_details": {"cached_tokens": cached}}},
    ]


STORED = event(0, stored([11, 12, 13, 14], PROMPT[:16]))
"""Four engine blocks of four tokens."""


def mismatches(report: CaptureReport) -> list[tuple[str, int, int]]:
    return [(mismatch.label, mismatch.predicted, mismatch.actual) for mismatch in report.mismatches]


# Recorded engines


@pytest.mark.parametrize(("name", "requests"), [("capture", 25), ("capture-lora", 21), ("capture-v028-bs16", 25)])
def test_recorded_hits_are_predicted_but_after_the_reset_that_was_not_announced(name: str, requests: int) -> None:
    report = check_capture(recorded(name))
    assert [mismatch.label for mismatch in report.mismatches] == ["chat1-after-reset"]
    assert (report.requests, report.unsupported) == (requests, [])


@pytest.mark.parametrize(("name", "requests"), [("oracle-bs16", 1218), ("oracle-bs32", 1202)])
def test_every_look_up_of_the_engines_own_cache_manager_is_predicted(name: str, requests: int) -> None:
    report = check_capture(recorded(name))
    assert (report.requests, report.mismatches) == (requests, [])


@pytest.mark.parametrize("block_size", [1, 8, 64, 128])
@pytest.mark.parametrize("name", ORACLES)
def test_predictions_hold_for_token_blocks_that_divide_the_engines_or_are_multiples(name: str, block_size: int) -> None:
    assert check_capture(recorded(name), block_size=block_size).mismatches == []


class CountsNoCopies(Ledger):
    def apply(self, event: Event) -> None:
        super().apply(event)
        for tree in self._trees.values():
            tree.copies.clear()


class IgnoresClears(Ledger):
    def apply(self, event: Event) -> None:
        if not isinstance(event, AllBlocksCleared):
            super().apply(event)


@pytest.mark.parametrize("ledger", [CountsNoCopies, IgnoresClears])
@pytest.mark.parametrize("name", ORACLES)
def test_the_check_bites(name: str, ledger: type[Ledger]) -> None:
    assert check_capture(recorded(name), make_ledger=ledger).mismatches


# The rules of comparison


def test_a_wrong_prediction_is_reported_in_tokens() -> None:
    rows = [STORED, *asked("right", PROMPT, 16), *asked("wrong", PROMPT, 12), *asked("missed", PROMPT[1:], 4)]
    report = check_capture(rows)
    assert (report.frames, report.events, report.requests) == (1, 1, 3)
    assert report.mismatches == [
        Mismatch(label="wrong", predicted=16, actual=12),
        Mismatch(label="missed", predicted=0, actual=4),
    ]


@pytest.mark.parametrize(("tokens", "largest"), [(17, 16), (16, 12), (13, 12), (12, 8), (4, 0), (1, 0)])
def test_the_last_token_is_never_a_hit(tokens: int, largest: int) -> None:
    assert check_capture([STORED, *asked("r", PROMPT[:tokens], largest)]).mismatches == []


@pytest.mark.parametrize(
    ("block_size", "actual", "expected"),
    [
        (4, 16, []),
        (2, 16, []),  # 16 tokens held, the prompt's 17th differs
        (8, 16, []),
        (16, 16, []),
        (32, 16, []),  # less than a token block is no difference
        (3, 16, []),
        (3, 11, [("r", 15, 9)]),
        (16, 12, [("r", 16, 0)]),
    ],
)
def test_both_sides_are_compared_in_blocks_that_they_share(
    block_size: int, actual: int, expected: list[tuple[str, int, int]]
) -> None:
    assert mismatches(check_capture([STORED, *asked("r", PROMPT, actual)], block_size=block_size)) == expected


def test_a_prediction_in_small_token_blocks_is_floored_to_the_engines() -> None:
    prompt = [*PROMPT[:14], 900, 901, 902]
    rows = [event(0, stored([11, 12, 13, 14], PROMPT[:16])), *asked("r", prompt, 12)]
    assert check_capture(rows, block_size=2).mismatches == []


def test_requests_that_cannot_be_compared_are_left_out() -> None:
    rows = [STORED, *asked("several", PROMPT, 0, n=2), *asked("no-tokens", [], 0), *asked("no-count", PROMPT, None)]
    rows += asked("per-prompt", PROMPT, [16, 16])
    rows += [{"kind": "request", "label": "silent", "body": {}, "prompt_token_ids": PROMPT}]
    rows += [{"kind": "response", "label": "silent", "usage": None}, {"kind": "response", "status": 400}]
    report = check_capture(rows)
    assert (report.requests, report.mismatches, report.unsupported) == (0, [], [])


def test_prompts_of_more_than_tokens_are_named_but_not_compared() -> None:
    image = [{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {}}]}]
    text = [{"role": "user", "content": [{"type": "text", "text": "see"}]}, {"role": "user", "content": "this"}]
    rows = [STORED, *asked("image", PROMPT, 0, messages=image), *asked("embeds", PROMPT, 0, prompt_embeds="x")]
    report = check_capture([*rows, *asked("text", PROMPT, 16, messages=text)])
    assert (report.unsupported, report.requests, report.mismatches) == (["image", "embeds"], 1, [])


def test_removals_clears_and_copies_count_in_their_order() -> None:
    rows = [
        STORED,
        event(1, stored([14], PROMPT[12:16], parent=13), removed([14])),
        *asked("copied", PROMPT, 16),
        event(2, removed([14])),
        *asked("removed", PROMPT, 12),
        event(3, CLEARED),
        *asked("cleared", PROMPT, 0),
    ]
    report = check_capture(rows)
    assert (report.frames, report.events, report.requests, report.mismatches) == (4, 5, 3, [])


def test_salts_and_adapters_are_prompts_of_their_own() -> None:
    models = {"data": [{"id": "tiny"}, {"id": "poet", "parent": "tiny"}]}
    rows = [
        {"kind": "meta", "models": models},
        event(0, stored([11], PROMPT[:4], extra_keys=[["s"]])),
        event(1, stored([12, 13], PROMPT[:8], lora_id=1, lora_name="poet", extra_keys=[["poet"], ["poet"]])),
        *asked("plain", PROMPT, 0),
        *asked("alias", PROMPT, 0, model="tiny-latest"),
        *asked("salted", PROMPT, 4, cache_salt="s"),
        *asked("other-salt", PROMPT, 0, cache_salt="t"),
        *asked("adapter", PROMPT, 8, model="poet"),
    ]
    report = check_capture(rows)
    assert (report.requests, report.mismatches) == (5, [])


def test_publishers_are_followed_apart_and_the_best_one_counts() -> None:
    rows = [
        event(0, stored([11], PROMPT[:4]), port=1),
        event(0, stored([11, 12], PROMPT[:8]), port=2),
        event(1, CLEARED, port=1),
        *asked("r", PROMPT, 8),
    ]
    assert check_capture(rows).mismatches == []


def test_frames_that_cannot_be_read_are_survived() -> None:
    rows = [STORED, {"kind": "event", "seq": 1, "payload_hex": "c1"}, *asked("r", PROMPT, 16)]
    report = check_capture(rows)
    assert (report.frames, report.events, report.mismatches) == (2, 1, [])


@pytest.mark.parametrize("rows", [[], [event(0, CLEARED)], asked("r", PROMPT, 0), [{"kind": "event"}]])
def test_a_capture_without_stored_blocks_is_refused(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(CaptureError, match="no readable BlockStored"):
        check_capture(rows)


@pytest.mark.parametrize(
    "row",
    [
        {"kind": "event", "seq": 1},
        {"kind": "event", "seq": 1, "payload_hex": "xyz"},
        {"kind": "event", "payload_hex": "c1"},
        {"kind": "request", "body": {}, "prompt_token_ids": [1]},
        {"kind": "request", "label": "r", "body": {}, "prompt_token_ids": [-1] * 8},
        {"kind": "request", "label": "r", "body": [1], "prompt_token_ids": [1]},
    ],
)
def test_a_row_of_another_shape_is_refused_by_its_number(row: dict[str, Any]) -> None:
    with pytest.raises(CaptureError, match="row 2"):
        check_capture([STORED, row])


# The command


def test_the_command_prints_what_it_found_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    oracle, reset = str(CAPTURES / "oracle-bs16.jsonl.gz"), str(CAPTURES / "capture.jsonl.gz")
    assert main(["events", "check", "--json", oracle, reset]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "files": [
            {"file": oracle, "frames": 977, "events": 2374, "requests": 1218, "unsupported": [], "mismatches": []},
            {
                "file": reset,
                "frames": 30,
                "events": 138,
                "requests": 25,
                "unsupported": [],
                "mismatches": [{"label": "chat1-after-reset", "predicted": 64, "actual": 0}],
            },
        ]
    }


def test_the_command_succeeds_when_every_hit_is_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tmp_path / "plain.jsonl"
    plain.write_text("\n".join(map(json.dumps, [STORED, *asked("r", PROMPT, 16)])))
    assert main(["events", "check", str(plain)]) == 0
    assert capsys.readouterr().out == f"{plain}: 1 frames, 1 events, 1 requests: every hit as predicted\n"


def test_the_command_takes_another_block_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["events", "check", str(CAPTURES / "capture.jsonl.gz"), "--block-size", "128"]) == 0
    assert "every hit as predicted" in capsys.readouterr().out


def test_the_command_names_each_difference_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "capture.jsonl"
    rows = [STORED, *asked("wrong", PROMPT, 4), *asked("embeds", PROMPT, 0, prompt_embeds="x")]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert main(["events", "check", str(file)]) == 1
    out = capsys.readouterr().out
    assert "wrong: predicted 16 cached tokens, engine reported 4" in out
    assert "embeds: not predictable" in out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.jsonl", None),
        ("text.jsonl", b"no json"),
        ("list.jsonl", b"[1]"),
        ("binary.jsonl", b"\xff\xfe"),
        ("empty.jsonl", b""),
        ("plain.jsonl.gz", b"{}"),
        ("cut.jsonl.gz", gzip.compress(json.dumps(STORED).encode())[:-12]),
        ("broken.jsonl.gz", gzip.compress(b"x" * 100)[:10] + b"\xff" * 20),
    ],
)
def test_what_is_no_capture_ends_the_command_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    assert main(["events", "check", str(file)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("matrixinfer: ")
    assert str(file) in err


def test_a_block_size_below_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["events", "check", str(CAPTURES / "capture.jsonl.gz"), "--block-size", "0"]) == 2
    assert "--block-size" in capsys.readouterr().err
