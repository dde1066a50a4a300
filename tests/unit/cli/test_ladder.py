"""How a ladder is printed."""

from __future__ import annotations

import argparse
import io
from typing import Any

import msgspec
import pytest

from matrixinfer.cli.ladder import print_ladder, print_ladders, since
from matrixinfer.cli.terminal import Terminal
from matrixinfer.traffic.ladder.rungs import Ladder, of
from matrixinfer.traffic.ladder.tally import Tally


def ladder(*, rate: float = 1.0, **sums: float) -> Ladder:
    """A ladder of 1,000 prompt tokens, of which no pod held 800."""
    named = {name.replace("__", ":"): tokens for name, tokens in sums.items()}
    tally = Tally(sums={"requests": 2, "prompt": 1_000, "beyond": 800, "sampled": 800, "sampled_blocks": 50} | named)
    tally.rate, tally.different, tally.capacity, tally.pods = rate, 50, 4_000, 2
    tally.excess = {40: sums.get("sampled__evicted", 0.0)}
    return of(tally)


def printed(shown: Ladder) -> str:
    out = io.StringIO()
    as_json: dict[str, Any] = msgspec.to_builtins(shown)
    print_ladder(Terminal(file=out), as_json)
    return out.getvalue()


def test_the_largest_loss_comes_first_and_with_its_remedy() -> None:
    shown = printed(ladder(sampled__evicted=500, sampled__dropped=100)).splitlines()
    assert shown[0] == "2 requests with 1,000 prompt tokens"
    assert shown[1].split() == ["name", "share", "tokens", "meaning"]
    assert [line.split()[0] for line in shown[2:7]] == ["ideal", "capacity", "perfect", "predicted", "reported"]
    assert shown[3].split()[:4] == ["capacity", "about", "30.0%", "300"]
    start = shown.index("Where the rest went:")
    assert shown[start + 1].startswith("about 50.0% evicted: ")
    assert shown[start + 2].startswith("  -> about 1,000 more KV tokens (1 more pod like these), or off-load")
    assert shown[start + 3].startswith("20.0% new: ")


def test_what_is_unknown_and_what_is_estimated_is_said() -> None:
    shown = printed(ladder(sampled__capacity_unknown=400, rate=0.25))
    assert "capacity   unknown      -" in shown
    assert "about 60.0%" in shown  # the ideal
    assert "reported: no answer said how many tokens were cached (see drift.injectUsage)" in shown
    assert "estimated from 25.00% of the blocks, give or take" in shown
    assert "too few blocks were sampled for an estimate" in printed(ladder(sampled=0, sampled_blocks=0, rate=0.25))


def test_a_part_that_is_reported_is_named_as_such() -> None:
    shown = printed(ladder(reported_requests=1, reported_prompt=400, reported=300, reported_fewer=20))
    assert "reported: of the requests whose answers say it, 40.0% of the prompt tokens" in shown
    assert "5.0% fewer: engines reused less than predicted" in shown


def test_several_ladders_are_compared_with_what_can_be_done_about() -> None:
    out = io.StringIO()
    print_ladders(Terminal(file=out), {"one": ladder(sampled__evicted=500), "other": ladder()})
    heading, one, other = (line.split() for line in out.getvalue().splitlines())
    assert heading[:2] == ["policy", "ideal"]
    assert one[-2:] == ["evicted", "50.0%"]
    assert other[-1] == "-"


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("15m", 900), ("1h", 3_600), ("1d", 86_400)])
def test_times_have_units(text: str, seconds: int) -> None:
    assert since(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0h", "-1h", "1.5h", "h", "1w", "1h30m", "²h", "9" * 9])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a time such as"):
        since(text)


@pytest.mark.parametrize("text", ["2d", "25h", "999999"])
def test_no_more_is_promised_than_is_kept(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected at most 1d"):
        since(text)
