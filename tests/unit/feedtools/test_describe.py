import math
from typing import Any

import msgspec
import pytest

from matrixinfer.feedtools.describe import clock, describe, listed, plural, shown, tallied
from matrixinfer.kvevents.wire import decode
from tests.unit.kvevents.support import CLEARED, frame, removed, stored

TOKENS = list(range(5_000, 5_048))
PARENT = 0x1F2E33A0_55555555


def words(event: dict[str, Any] | list[Any], **options: Any) -> str:
    (decoded,) = decode(frame(event)).events
    return describe(decoded, seq=42, time=43_201.234, **options).words


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (stored([1, 2, 3], TOKENS, parent=PARENT), "stored 3 blocks of 16 tokens after 1f2e33a0…, on GPU"),
        (stored([1], TOKENS[:1]), "stored 1 block of 1 token at the start of a prompt, on GPU"),
        (
            stored([1], TOKENS[:16], parent=b"\xab" * 32, medium=None, group_idx=2),
            "stored 1 block of 16 tokens after abababab…, group 2",
        ),
        (
            stored([1], TOKENS[:16], lora_id=1, lora_name="poet", extra_keys=[["poet"]]),
            "stored 1 block of 16 tokens at the start of a prompt, on GPU, for adapter poet",
        ),
        (
            stored([1], TOKENS[:16], lora_id=1, lora_name="poet", extra_keys=[["poet", "s3cret"]]),
            "stored 1 block of 16 tokens at the start of a prompt, on GPU, for adapter poet, with extra keys (salt or media)",
        ),
        (
            ["BlockStored", [1], None, TOKENS[:16], 16, 7, "GPU"],
            "stored 1 block of 16 tokens at the start of a prompt, on GPU, for adapter number 7",
        ),
        (
            stored([1], TOKENS[:16], extra_keys=[None, 5, "x"]),
            "stored 1 block of 16 tokens at the start of a prompt, on GPU",
        ),
        (removed([1]), "removed 1 block, from GPU"),
        (removed([1, 2], medium="CPU", group_idx=1), "removed 2 blocks, from CPU, group 1"),
        (CLEARED, "cleared everything"),
    ],
)
def test_events_are_described_in_words(event: dict[str, Any] | list[Any], expected: str) -> None:
    assert words(event) == expected


def test_a_line_has_its_frames_number_and_time() -> None:
    (event,) = decode(frame(CLEARED)).events
    assert str(describe(event, seq=42, time=1_750_000_000 // 86_400 * 86_400 + 43_201.234)) == (
        "#42 12:00:01.234  cleared everything"
    )


def test_only_the_first_tokens_are_shown_and_only_where_asked_for() -> None:
    event = stored([1, 2, 3], TOKENS, extra_keys=[["s3cret"], None, None])
    assert words(event, with_tokens=True).endswith("; tokens 5000 5001 5002 5003 5004 5005 5006 5007 …")
    (decoded,) = decode(frame(event)).events
    for with_tokens in (False, True):
        line = describe(decoded, seq=1, time=0.0, with_tokens=with_tokens)
        text = str(line) + str(line.value())
        assert ("500" in text) == with_tokens
        assert "5008" not in text
        assert "s3cret" not in text


def test_tokens_that_do_not_fit_are_not_shown() -> None:
    assert "tokens 5" not in words(stored([1], TOKENS[:3], block_size=16), with_tokens=True)


def test_the_value_says_whether_a_layout_has_extra_keys() -> None:
    for event, expected in (
        (stored([1], TOKENS[:16], extra_keys=[["salt"]]), True),
        (stored([1], TOKENS[:16]), False),
        (["BlockStored", [1], None, TOKENS[:16], 16, None, "GPU"], None),
    ):
        (decoded,) = decode(frame(event)).events
        assert describe(decoded, seq=0, time=0.0).value()["extra_keys"] is expected


@pytest.mark.parametrize("time", [math.nan, math.inf, -math.inf, 1e308, None])
def test_an_impossible_time_is_not_shown(time: float | None) -> None:
    assert clock(time) == "--:--:--.---"


@pytest.mark.parametrize(
    ("time", "expected"),
    [(0.0, "00:00:00.000"), (86_399.9996, "23:59:59.999"), (86_400.0, "00:00:00.000"), (-1.0, "23:59:59.000")],
)
def test_times_of_day(time: float, expected: str) -> None:
    assert clock(time) == expected


def test_values_of_lines_are_json() -> None:
    (event,) = decode(frame(stored([-1], TOKENS[:16]), timestamp=math.inf)).events
    value = describe(event, seq=1, time=math.inf).value()
    assert value["time"] is None
    assert value["blocks"] == ["ffffffffffffffff"]
    assert msgspec.json.decode(msgspec.json.encode(value)) == value


def test_names_from_the_wire_cannot_drive_a_terminal() -> None:
    assert shown("\x1b[2Jpoet\n") == "?[2Jpoet?"
    assert shown("x" * 65) == "x" * 64 + "…"


def test_counts_and_lists() -> None:
    assert (plural(0, "block"), plural(1, "block"), plural(2, "block")) == ("0 blocks", "1 block", "2 blocks")
    assert tallied((0, "gap"), (2, "orphan block")) == ["2 orphan blocks"]
    assert [listed(list("abc"[:n])) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
