"""`matrixinfer events check`, and the arguments of the commands that listen."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from matrixinfer.cli import main
from matrixinfer.cli.events.sources import sources
from matrixinfer.config import KvEventsConfig
from matrixinfer.errors import ConfigError
from tests.unit.kvevents.support import CLEARED, frame, stored

CAPTURES = Path(__file__).parents[2] / "data" / "captures"
ORACLE, RESET, RANKS = (str(CAPTURES / f"{name}.jsonl.gz") for name in ("oracle-bs16", "capture", "capture-dp2"))
PROMPT = list(range(40))
STORED = {"kind": "event", "seq": 0, "payload_hex": frame(stored([11, 12, 13, 14], PROMPT[:16])).hex()}


def asked(label: str, cached: int, **body: Any) -> list[dict[str, Any]]:
    return [
        {"kind": "request", "label": label, "body": body, "prompt_token_ids": PROMPT},
        {"kind": "response", "label": label, "usage": {"prompt_tokens_details": {"cached_tokens": cached}}},
    ]


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    """A capture with a correct prediction, a wrong one, and a prompt whose hit cannot be predicted."""
    rows = [STORED, *asked("right", 16), *asked("wrong", 4), *asked("embeds", 0, prompt_embeds="x")]
    file = tmp_path / "capture.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def good(tmp_path: Path) -> Path:
    file = tmp_path / "good.jsonl"
    file.write_text("\n".join(map(json.dumps, [STORED, *asked("r", 16)])))
    return file


def publisher(**fields: Any) -> dict[str, Any]:
    counts = dict.fromkeys(["malformed", "gaps", "restarts", "unreadable", "misfits", "orphans"], 0)
    return {"name": "", **counts, "untrusted": None, **fields}


# Check


def test_check_prints_what_it_found_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["events", "check", "--json", ORACLE, RESET, RANKS]) == 1
    common = {"truncated": False, "unsupported": {}, "mismatches": []}
    assert json.loads(capsys.readouterr().out) == {
        "files": [
            {
                **common,
                "file": ORACLE,
                "frames": 977,
                "events": 2374,
                "requests": 1218,
                "publishers": [publisher(frames=977, events=2374, blocks=90)],
            },
            {
                **common,
                "file": RESET,
                "frames": 30,
                "events": 138,
                "requests": 25,
                "mismatches": [{"label": "chat1-after-reset", "predicted": 64, "actual": 0}],
                "publishers": [publisher(frames=30, events=138, blocks=2)],
            },
            {
                **common,
                "file": RANKS,
                "frames": 5,
                "events": 5,
                "requests": 0,
                "publishers": [
                    publisher(name="5557", frames=3, events=3, blocks=9),
                    publisher(name="5558", frames=2, events=2, blocks=6),
                ],
            },
        ]
    }


def test_check_succeeds_when_every_hit_is_predicted(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["events", "check", str(good)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{good}: 1 frame, 1 event, 1 request: every hit was predicted",
        "  4 engine blocks cached at the end",
    ]


def test_check_names_each_difference(capture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["events", "check", str(capture)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{capture}: 1 frame, 1 event, 2 requests: 1 mismatch; 1 more request cannot be predicted",
        "  4 engine blocks cached at the end",
        "  embeds: cannot be predicted: more than tokens",
        "  wrong: predicted 16 cached tokens, the engine reported 4",
    ]


def test_check_says_how_many_requests_it_could_not_compare_and_why_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "capture.jsonl"
    left_out = [row for number in range(5) for row in asked(f"e{number}", 0, prompt_embeds="x")]
    file.write_text("\n".join(map(json.dumps, [STORED, *asked("right", 16), *left_out])))
    assert main(["events", "check", str(file)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{file}: 1 frame, 1 event, 1 request: every hit was predicted; 5 more requests cannot be predicted",
        "  4 engine blocks cached at the end",
        "  e0, e1, e2 and 2 more: cannot be predicted: more than tokens",
    ]


def test_check_names_the_limits_of_a_publisher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "capture.jsonl"
    chunk = frame(stored([21], PROMPT[:16], medium="cpu")).hex()
    rows = [STORED, {"kind": "event", "seq": 1, "payload_hex": chunk}, *asked("r", 16)]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert main(["events", "check", str(file)]) == 0
    first, feed = capsys.readouterr().out.splitlines()
    assert first == f"{file}: 2 frames, 2 events, 1 request: every hit was predicted"
    assert feed.startswith("  5 engine blocks cached at the end; limit: the cpu tier publishes no evictions")
    assert main(["events", "check", "--json", str(file)]) == 0
    (publisher,) = json.loads(capsys.readouterr().out)["files"][0]["publishers"]
    assert len(publisher["limits"]) == 1


def test_check_reports_each_publisher_and_needs_no_requests(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["events", "check", RANKS]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{RANKS}: 5 frames, 5 events, 0 requests: no requests to compare",
        "  publisher 5557: 3 frames, 3 events, 9 engine blocks cached at the end",
        "  publisher 5558: 2 frames, 2 events, 6 engine blocks cached at the end",
    ]


def test_check_fails_where_a_frame_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "capture.jsonl"
    unknown = {"kind": "event", "seq": 2, "payload_hex": frame(CLEARED, {"type": "Unknown"}).hex()}
    garbage = {"kind": "event", "seq": 1, "payload_hex": "c1"}
    file.write_text("\n".join(map(json.dumps, [STORED, garbage, unknown])))
    assert main(["events", "check", str(file)]) == 1
    assert capsys.readouterr().out.splitlines()[1] == (
        "  0 engine blocks cached at the end; 1 unreadable frame; 1 unreadable event; limit: an event type that this "
        "release does not know (Unknown), which may add or remove blocks, so hits may be longer or shorter than "
        "predicted; upgrade the gateway"
    )


def test_check_takes_another_block_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["events", "check", RESET, "--block-size", "128"]) == 0
    assert "every hit was predicted" in capsys.readouterr().out


def test_a_block_size_below_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["events", "check", RESET, "--block-size", "0"])
    assert "--block-size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.jsonl", None),
        ("text.jsonl", b"no json"),
        ("list.jsonl", b"[1]"),
        ("binary.jsonl", b"\xff\xfe"),
        ("empty.jsonl", b""),
        ("plain.jsonl.gz", b"{}"),
        ("broken.jsonl.gz", gzip.compress(b"x" * 100, mtime=0)[:10] + b"\xff" * 20),
        ("other.jsonl", b'{"kind": "event"}'),
    ],
)
def test_a_file_that_is_not_a_capture_does_not_hide_the_others(
    tmp_path: Path, good: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    assert main(["events", "check", str(file), str(good)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"matrixinfer: {file}: ")
    assert f"{good}: 1 frame" in out
    assert main(["events", "check", "--json", str(good), str(file)]) == 2
    first, second = json.loads(capsys.readouterr().out)["files"]
    assert (first["requests"], second) == (1, {"file": str(file), "error": second["error"]})


def test_check_reads_a_truncated_file_up_to_its_last_row(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good.write_text(good.read_text() + "\n{")
    assert main(["events", "check", str(good)]) == 0
    assert "  the file is truncated: checked up to its last complete row" in capsys.readouterr().out.splitlines()


# Mutations


@pytest.mark.parametrize(("mutation", "hits"), [("copies", 4), ("clear", 14), ("removed", 2), ("salt", 21)])
def test_every_mutation_is_detected(mutation: str, hits: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["events", "check", ORACLE, "--mutate", mutation]) == 0
    first, *differences = capsys.readouterr().out.splitlines()
    assert first.endswith(f": `{mutation}` makes {hits} hits differ")
    assert len(differences) == hits


def test_a_mismatch_without_the_mutation_detects_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["events", "check", RESET, "--mutate", "clear"]) == 1
    assert capsys.readouterr().out == f"{RESET}: 30 frames, 138 events, 25 requests: `clear` was not detected\n"


def test_mutations_are_in_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["events", "check", "--json", RESET, RANKS, "--mutate", "salt"]) == 1
    reset, ranks = json.loads(capsys.readouterr().out)["files"]
    assert (reset["mutation"], reset["detected"], len(reset["mismatches"])) == ("salt", 1, 2)
    assert (ranks["mutation"], ranks["detected"], ranks["mismatches"]) == ("salt", 0, [])


# Arguments of tail and record


@pytest.mark.parametrize(
    "words",
    [
        ["tail", "10.0.0.1:5557"],
        ["tail", "tcp://*:5557"],
        ["tail", "tcp://10.0.0.1"],
        ["tail", "tcp://10.0.0.1:5557", "--replay", "http://10.0.0.1:8001"],
        ["tail", "tcp://10.0.0.1:5557", "--seconds", "0"],
        ["tail", "tcp://10.0.0.1:5557", "--seconds", "nan"],
        ["tail", "tcp://10.0.0.1:5557", "--seconds", "soon"],
        ["tail", "tcp://10.0.0.1:5557", "--count", "0"],
        ["record", "tcp://10.0.0.1:5557"],
    ],
)
def test_bad_arguments_are_refused_in_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["events", *words])
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "expected" in err or "required" in err


def test_a_publisher_may_be_named_by_the_url_of_its_engine(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["events", "tail", "127.0.0.1:8001"])
    assert "an engine's URL such as http://HOST:PORT, got `127.0.0.1:8001`" in capsys.readouterr().err


def test_a_recording_is_overwritten_only_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "feed.jsonl"
    file.write_text("precious")
    words = ["events", "record", "tcp://127.0.0.1:9", "--seconds", "0.01", "-o", str(file)]
    assert main(words) == 2
    assert f"{file} exists: name another file, or add --force" in capsys.readouterr().err
    assert file.read_text() == "precious"
    assert main([*words, "--force"]) == 0
    assert "precious" not in file.read_text()


def test_the_help_of_record_warns_that_a_recording_contains_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["events", "record", "--help"])
    assert "contains token ids, and so the text of prompts" in " ".join(capsys.readouterr().out.split())


async def test_replay_endpoints_belong_to_the_endpoints_in_order() -> None:
    assert await sources(["tcp://a:1", "tcp://b:1"], ["tcp://a:2"]) == [
        KvEventsConfig(endpoint="tcp://a:1", replay_endpoint="tcp://a:2"),
        KvEventsConfig(endpoint="tcp://b:1"),
    ]


@pytest.mark.parametrize("addresses", [["tcp://a:1"], ["http://a:8001", "tcp://b:1"]])
async def test_replay_endpoints_without_an_endpoint_are_refused(addresses: list[str]) -> None:
    with pytest.raises(ConfigError, match="--replay"):
        await sources(addresses, ["tcp://a:2", "tcp://b:2"])
