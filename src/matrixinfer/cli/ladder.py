"""Prints a ladder: what was left of the prompt tokens on each rung, and where the rest went."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from matrixinfer.cli.terminal import Rows, Terminal
from matrixinfer.feedtools.describe import plural
from matrixinfer.traffic.ladder.record import KEPT_SECONDS
from matrixinfer.traffic.ladder.rungs import Ladder, RungName

Json = Mapping[str, Any]
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400}
_LEAST_SHARE = 0.001
"""Smaller losses are only in the JSON."""


def since(text: str) -> int:
    """A stretch of time in seconds, from text such as `90`, `15m`, `1h` or `1d`."""
    found = re.fullmatch(r"([0-9]{1,6})([smhd]?)", text)
    if found is None or not int(found[1]):
        raise argparse.ArgumentTypeError(f"expected a time such as 90s, 15m, 1h or 1d, got `{text}`")
    seconds = int(found[1]) * _UNITS[found[2]]
    if seconds > KEPT_SECONDS:
        raise argparse.ArgumentTypeError(f"expected at most 1d, as the gateway keeps no more, got `{text}`")
    return seconds


def print_ladder(console: Terminal, ladder: Json, *, worker: int = 1, workers: int = 1) -> None:
    """Print the rungs as a table, then each loss with its remedy, the largest first.

    Of several `workers`, the ladder is that of one `worker`.
    """
    if workers > 1:
        console.print(f"of the requests of worker {worker} of {workers}:")
    if not ladder["prompt_tokens"]:
        console.print("no request has ended in that time")
        return
    console.print(f"{plural(ladder['requests'], 'request')} with {ladder['prompt_tokens']:,} prompt tokens")
    table = Rows("name", "share", "tokens", "meaning")
    for rung in ladder["rungs"]:
        about = "about " if rung["is_estimate"] else ""
        table.add_row(
            rung["name"],
            "unknown" if rung["share"] is None else f"{about}{_percent(rung['share'])}",
            "-" if rung["tokens"] is None else f"{rung['tokens']:,}",
            rung["meaning"],
        )
    console.print(table)
    for line in _remarks(ladder):
        console.print(line)
    losses = sorted((loss for rung in ladder["rungs"] for loss in rung["losses"]), key=lambda each: -each["share"])
    shown = [loss for loss in losses if loss["share"] >= _LEAST_SHARE]
    if shown:
        console.print()
        console.print("Where the rest went:")
    _print_losses(console, shown)


def print_ladders(console: Terminal, ladders: Mapping[str, Ladder]) -> None:
    """Print the shares of several ladders as a table, and the largest losses of each that anything can be done about."""
    table = Rows("policy", *get_args(RungName), "largest losses")
    for name, ladder in ladders.items():
        losses = sorted(
            (loss for rung in ladder.rungs for loss in rung.losses if loss.remedy), key=lambda each: -each.share
        )
        largest = ", ".join(f"{each.name} {_percent(each.share)}" for each in losses[:2] if each.share >= _LEAST_SHARE)
        shares = ["-" if rung.share is None else _percent(rung.share) for rung in ladder.rungs]
        table.add_row(name, *shares, largest or "-")
    console.print(table)


def _print_losses(console: Terminal, losses: Sequence[Json]) -> None:
    for loss in losses:
        about = "about " if loss["is_estimate"] else ""
        console.print(f"{about}{_percent(loss['share'])} {loss['name']}: {loss['cause']}")
        if loss["remedy"] is not None:
            console.print(f"  -> {loss['remedy']}")


def _remarks(ladder: Json) -> list[str]:
    """What the numbers rest on."""
    reported = next(rung for rung in ladder["rungs"] if rung["name"] == "reported")
    share = reported["of_tokens"] / ladder["prompt_tokens"]
    remarks = []
    if not ladder["reported_requests"]:
        remarks.append("reported: no answer said how many tokens were cached (see drift.injectUsage)")
    elif share < 0.9995:
        remarks.append(f"reported: of the requests whose answers say it, {_percent(share)} of the prompt tokens")
    if ladder["error_share"] is None:
        remarks.append("ideal, capacity: too few blocks were sampled for an estimate")
    elif ladder["error_share"]:
        remarks.append(
            f"ideal, capacity: estimated from {ladder['sampled_share']:.2%} of the blocks, give or take "
            f"{_percent(ladder['error_share'])}"
        )
    return remarks


def _percent(share: float) -> str:
    return f"{share * 100:.1f}%"
