"""The page: one HTML file that loads nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from matrixinfer import __version__
from matrixinfer.study.report import charts
from matrixinfer.study.report.advice import (
    BOUNDS,
    Point,
    Results,
    advise,
    chosen,
    contenders,
    percent,
    regret,
    seconds,
)
from matrixinfer.study.runs import Outcome

_COLOURS = 9
_COLUMNS = (
    ("hit rate", "hit_rate", percent),
    ("mean TTFT", "ttft_mean_s", seconds),
    ("p50", "ttft_p50_s", seconds),
    ("p90", "ttft_p90_s", seconds),
    ("p99", "ttft_p99_s", seconds),
    ("time per token", "tpot_s", seconds),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chapter:
    """One trace, as it was replayed by each policy."""

    trace: str
    settings: Mapping[str, object]
    outcomes: Sequence[Outcome]


def page(chapters: Sequence[Chapter]) -> str:
    """The whole file."""
    style = files("matrixinfer.study.report").joinpath("style.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    body = "".join("".join(_chapter(each)) for each in chapters)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>Replay: {escape(', '.join(each.trace for each in chapters))}</title><style>{style}</style></head>"
        f"<body><main><header><h1>What routing gains on this traffic</h1><p>MatrixInfer Gateway {escape(__version__)}, "
        "<code>matrixinfer replay</code></p></header>"
        f"{body}{_NOTE}</main></body></html>\n"
    )


_NOTE = (
    '<section><h3>How to read this</h3><p class="note">The traffic was replayed in virtual time: the gateway decided with its '
    "own code, the engines are a model. Compare policies with these times; do not plan capacity with them. "
    "TTFT is the time to first token. <em>pooled</em> and <em>clairvoyant</em> are bounds: the first gives all pods one cache, "
    "the second knows each engine's cache and queue, and the requests to come. Regret is the mean TTFT in multiples of the "
    "better bound's. Two policies whose times differ by one or two percent are the same, until "
    "<code>matrixinfer tune</code> shows otherwise.</p></section>"
)


def _chapter(chapter: Chapter) -> Iterator[str]:
    results = {outcome.policy: outcome.results for outcome in chapter.outcomes}
    ladders = {outcome.policy: outcome.ladder for outcome in chapter.outcomes}
    advice = advise(results, ladders)
    settings = chapter.settings
    yield (
        f'<section><p class="trace">{escape(chapter.trace)}: {settings["requests"]} requests, {settings["pods"]} pods of '
        f"{settings['kv_tokens_per_pod']:,} KV tokens, engine {escape(str(settings['engine']))}{_recorded(settings)}</p>"
        f'<h2>{escape(advice.headline)}</h2><p class="lead">{charts.marked(advice.summary)}</p>{_points(advice.points)}'
    )
    if not contenders(results):
        yield "</section>"
        return
    best = chosen(results)
    colours = _colours(chapter.outcomes, best)
    legend = _legend(chapter.outcomes, colours, best)
    yield f"<h3>The policies</h3>{_table(results, colours, best)}"
    yield f'<h3>Where prompt tokens are lost</h3><p class="note">Of all prompt tokens, with {escape(best)}.</p>'
    yield charts.ladder(ladders[best].rungs)
    yield f"<h3>How long users wait for the first token</h3>{legend}"
    yield charts.first_tokens(chapter.outcomes, colours, best)
    yield f"<h3>Hits over time</h3>{legend}{charts.hits_over_time(chapter.outcomes, colours, best)}"
    yield '<h3>Load of each pod</h3><p class="note">A row is a pod, time runs to the right.</p>'
    yield charts.load_maps(chapter.outcomes, best)
    yield "</section>"


def _recorded(settings: Mapping[str, object]) -> str:
    """What an access log itself says, to compare the replay with."""
    trace = settings.get("trace")
    recorded = trace.get("recorded") if isinstance(trace, Mapping) else None
    if not isinstance(recorded, Mapping):
        return ""
    return (
        f"<br>As recorded: hit rate {percent(recorded['hit_rate'])}, mean time to first token "
        f"{seconds(recorded['ttft_mean_s'])}"
    )


def _points(points: Sequence[Point]) -> str:
    shown = "".join(
        f"<div><h4>{escape(each.title)}</h4><p>{charts.marked(each.text)}</p>"
        + (f"<p>{charts.marked(each.remedy)}</p>" if each.remedy else "")
        + "</div>"
        for each in points
    )
    return f'<div class="points">{shown}</div>' if shown else ""


def _colours(outcomes: Sequence[Outcome], best: str) -> list[int]:
    """The chosen policy has the first colour, bounds are grey and broken, others share the rest."""
    free = iter([number % (_COLOURS - 1) + 2 for number in range(len(outcomes))])
    greys = {"pooled": 0, "clairvoyant": 10}
    return [
        greys[each.policy] if each.policy in BOUNDS else 1 if each.policy == best else next(free) for each in outcomes
    ]


def _legend(outcomes: Sequence[Outcome], colours: Sequence[int], best: str) -> str:
    items = "".join(
        f'<li class="c{colour}"><span class="swatch"></span><span class="word{" bold" if each.policy == best else ""}">'
        f"{escape(each.policy)}</span></li>"
        for each, colour in zip(outcomes, colours, strict=True)
    )
    return f'<ul class="legend">{items}</ul>'


def _table(results: Mapping[str, Results], colours: Sequence[int], best: str) -> str:
    colour_of = dict(zip(results, colours, strict=True))
    names = [*contenders(results), *(name for name in results if name in BOUNDS)]
    head = "".join(f'<th scope="col">{title}</th>' for title, _, _ in _COLUMNS)
    rows = "".join(
        f'<tr class="{"chosen" if name == best else "bound" if name in BOUNDS else ""}"><th scope="row">'
        f'<span class="swatch c{colour_of[name]}"></span>{escape(name)}</th>'
        + "".join(f"<td>{show(results[name][key])}</td>" for _, key, show in _COLUMNS)
        + f"<td>{_times(results[name]['imbalance'])}</td><td>{_times(regret(results, name))}</td></tr>"
        for name in names
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="results by policy"><table><thead><tr>'
        f'<th scope="col">policy</th>{head}<th scope="col">busiest pod</th><th scope="col">regret</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} ×"
