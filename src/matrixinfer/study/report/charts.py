"""Charts as HTML: lines are an SVG that stretches with the page, words beside it keep their size.

Everything is drawn in the page's own colours, so that it follows a light or dark theme.
"""

from __future__ import annotations

import math
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from matrixinfer.study.report.advice import percent
from matrixinfer.study.report.png import png
from matrixinfer.study.runs import Outcome
from matrixinfer.traffic.ladder.rungs import Rung

_POINTS = 240
_WINDOWS = 40
_COLUMNS = 120
"""Cells of a heat map in a row."""
_SIZE = 1000
_LEAST_LOSS = 0.002
"""Smaller losses are left out of the ladder."""
_MOST_TIMES = 2
"""An axis is at most so many times as long as the chosen policy needs it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A curve with values from 0 to 1 in both directions, from the lower left."""

    name: str
    colour: int
    """Number of a colour of the page; bounds have 0 and 10, which are grey."""
    is_bold: bool
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Marks from 0 to 1, with their words."""

    title: str
    marks: Sequence[tuple[float, str]]


_SHARES = Axis(title="", marks=[(share / 4, f"{share * 25} %") for share in range(5)])


def first_tokens(outcomes: Sequence[Outcome], colours: Sequence[int], bold: str) -> str:
    """The share of requests whose first token has come after a time."""
    times = {outcome.policy: np.sort([max(each[1], 1e-3) for each in outcome.requests]) for outcome in outcomes}
    known = [values for values in times.values() if len(values)]
    low = math.log10(min((values[int(len(values) * 0.005)] for values in known), default=1e-3))
    high = math.log10(max((values[int(len(values) * 0.999)] for values in known), default=1.0))
    low, high = math.floor(low * 2) / 2, max(math.ceil(high * 2) / 2, math.floor(low * 2) / 2 + 0.5)
    lines = []
    for outcome, colour in zip(outcomes, colours, strict=True):
        values = times[outcome.policy]
        shares = np.linspace(0, 1, min(len(values), _POINTS)) if len(values) else np.zeros(0)
        at = np.quantile(values, shares) if len(values) else shares
        points = [
            (max(0.0, (math.log10(time) - low) / (high - low)), share)
            for time, share in zip(at, shares, strict=True)
            if math.log10(time) <= high
        ]
        lines.append(Line(name=outcome.policy, colour=colour, is_bold=outcome.policy == bold, points=points))
    decades = range(math.ceil(low), math.floor(high) + 1)
    marks = [((decade - low) / (high - low), _time(10.0**decade)) for decade in decades]
    return _plot(lines, Axis(title="time to first token", marks=marks), _SHARES, label="share of requests")


def hits_over_time(outcomes: Sequence[Outcome], colours: Sequence[int], bold: str) -> str:
    """The share of the prompt tokens that were cached, by arrival."""
    end = _end({outcome.policy: [each[0] for each in outcome.requests[-1:]] for outcome in outcomes}, bold)
    edges = np.linspace(0, end, _WINDOWS + 1)
    rates: list[list[tuple[float, float]]] = []
    for outcome in outcomes:
        arrived = np.array([each[0] for each in outcome.requests])
        prompt, _ = np.histogram(arrived, edges, weights=[each[2] for each in outcome.requests])
        cached, _ = np.histogram(arrived, edges, weights=[each[3] for each in outcome.requests])
        shown = [number for number in range(_WINDOWS) if prompt[number] > 0]
        rates.append([((number + 0.5) / _WINDOWS, float(cached[number] / prompt[number])) for number in shown])
    top = math.ceil(max((y for points in rates for _, y in points), default=1.0) * 5) / 5 or 0.2
    lines = [
        Line(
            name=outcome.policy,
            colour=colour,
            is_bold=outcome.policy == bold,
            points=[(x, y / top) for x, y in points],
        )
        for outcome, colour, points in zip(outcomes, colours, rates, strict=True)
    ]
    unit, per = (60.0, "min") if end >= 300 else (1.0, "s")
    marks = [(share / 4, f"{end / unit * share / 4:.0f} {per}") for share in range(5)]
    up = Axis(title="", marks=[(share / 4, f"{top * share * 25:g} %") for share in range(5)])
    return _plot(lines, Axis(title="arrival", marks=marks), up, label="hit rate, share of prompt tokens")


def load_maps(outcomes: Sequence[Outcome], bold: str) -> str:
    """For each policy, requests at each pod over time: a row is a pod, darker is more."""
    end = _end({outcome.policy: [each.at for each in outcome.samples[-1:]] for outcome in outcomes}, bold)
    highest = {
        outcome.policy: max((max(each.requests, default=0) for each in outcome.samples), default=0)
        for outcome in outcomes
    }
    most = max(highest.values())
    is_cut = most > _MOST_TIMES * max(1, highest[bold])
    most = _MOST_TIMES * max(1, highest[bold]) if is_cut else max(1, most)
    maps = []
    for outcome in outcomes:
        pods = max((len(each.requests) for each in outcome.samples), default=1)
        shown = [sample for sample in outcome.samples if sample.at <= end]
        grid = np.zeros((pods, max(1, min(_COLUMNS, *(len(each.samples) for each in outcomes)))))
        for sample in shown:
            column = min(int(sample.at / end * grid.shape[1]), grid.shape[1] - 1)
            for pod, requests in enumerate(sample.requests):
                grid[pod, column] = max(grid[pod, column], requests)
        name = escape(outcome.policy)
        maps.append(
            f'<figure class="map"><figcaption>{name}</figcaption>'
            f'<img alt="requests at each of {pods} pods over time, with {name}" src="{_image(grid / most)}" '
            f'style="height:{max(40, min(160, pods * 10))}px"></figure>'
        )
    scale = _image(np.linspace(0, 1, 32)[None, :])
    legend = f'<p class="scale"><span>0</span><img alt="" src="{scale}"><span>{most} requests at a pod{" or more" if is_cut else ""}</span></p>'
    return f'<div class="maps">{"".join(maps)}</div>{legend}'


def _end(ends: Mapping[str, Sequence[float]], bold: str) -> float:
    """When a time axis ends: with the last policy, unless one takes so long that all others would be a sliver."""
    of_chosen = max(ends.get(bold, ()), default=0.0)
    return min(max((max(each, default=0.0) for each in ends.values()), default=0.0), _MOST_TIMES * of_chosen) or 1.0


def ladder(rungs: Sequence[Rung]) -> str:
    """Bars from everything down to what engines reuse, with what is lost between them."""
    rows, before = [], 1.0
    for rung in rungs:
        for loss in rung.losses:
            if loss.share >= _LEAST_LOSS:
                remedy = f"<br>→ {marked(loss.remedy)}" if loss.remedy else ""
                rows.append(f'<li class="loss"><em>−{percent(loss.share)}</em> {marked(loss.cause)}{remedy}</li>')
        share = before if rung.share is None else rung.share
        lost = max(0.0, before - share)
        rows.append(
            f'<li><span class="name">{escape(rung.name)}</span><span class="bar"><span class="lost" '
            f'style="left:{share:.2%};width:{lost:.2%}"></span>'
            f'<span class="kept" style="width:{share:.2%}"></span></span>'
            f'<b>{"unknown" if rung.share is None else percent(share)}</b><span class="meaning">{escape(rung.meaning)}</span></li>'
        )
        before = min(before, share)
    return f'<ol class="ladder">{"".join(rows)}</ol>'


def marked(text: str) -> str:
    """Text for the page, with what is in backticks as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def _plot(lines: Sequence[Line], across: Axis, up: Axis, *, label: str) -> str:
    grid = "".join(f'<path class="grid" d="M{x * _SIZE:.0f} 0V{_SIZE}"/>' for x, _ in across.marks)
    grid += "".join(f'<path class="grid" d="M0 {(1 - y) * _SIZE:.0f}H{_SIZE}"/>' for y, _ in up.marks)
    curves = "".join(
        f'<path class="curve c{line.colour}{" bold" if line.is_bold else ""}" d="{_path(line.points)}">'
        f"<title>{escape(line.name)}</title></path>"
        for line in sorted(lines, key=lambda line: line.is_bold)
        if line.points
    )
    words = "".join(
        f'<span class="x{" last" if x > 0.97 else ""}" style="left:{x:.1%}">{escape(word)}</span>'
        for x, word in across.marks
    )
    words += "".join(f'<span class="y" style="bottom:{y:.1%}">{escape(word)}</span>' for y, word in up.marks)
    names = ", ".join(line.name for line in lines)
    return (
        f'<p class="axis">{escape(label)}</p><div class="plot"><svg viewBox="0 0 {_SIZE} {_SIZE}" '
        f'preserveAspectRatio="none" role="img" aria-label="{escape(label)}, by {escape(across.title)}: {escape(names)}">'
        f'{grid}{curves}</svg>{words}</div><p class="axis end">{escape(across.title)}</p>'
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x * _SIZE:.1f} {(1 - y) * _SIZE:.1f}" for x, y in points)


def _image(grid: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> str:
    """Values from 0 to 1 as opacities of one colour, which shows on light and on dark."""
    pixels = np.zeros((*grid.shape, 4), np.uint8)
    pixels[..., :3] = (217, 119, 6)
    pixels[..., 3] = np.round(255 * np.clip(grid, 0, 1) ** 0.75)
    return "data:image/png;base64," + b64encode(png(pixels)).decode()


def _time(value: float) -> str:
    return f"{value * 1000:g} ms" if value < 1 else f"{value:g} s"
