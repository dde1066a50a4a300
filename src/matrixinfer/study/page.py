"""Writes docs/evaluation.md from the results of the matrix: what wins, where we lose, and every figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap

from matrixinfer import __version__
from matrixinfer.study.matrix import (
    BOUNDS,
    COMPARED,
    CONDITIONS,
    DEFAULT,
    MOST,
    OURS,
    USUAL,
    Cell,
    Condition,
    geometric_mean,
    grouped,
    regrets,
)

_COLUMNS = ("hit_rate", "ttft_mean_s", "ttft_p90_s", "ttft_p99_s", "tpot_s", "imbalance")
_WITHIN = 1.05
_WIDTH = 100
_MOST_LOSSES = 20

_HEAD = """# Evaluation

Which routing policy is best, on which traffic, and where is ours not? `make study TRACES=folder`
replays every trace in a folder, and generated traffic, as [Replay](replay.md) describes, and writes
this page. Do not edit it.

The engine is a model with derived times: compare policies, and do not plan capacity with these
figures. Each trace has as many pods, 4 to 16, as would be half busy if every hit were found.

"""


def page(
    cells: Sequence[Cell],
    traces: Mapping[str, str],
    engine: str,
    conditions: Sequence[Condition] = CONDITIONS,
    *,
    reading: str = "",
    plots: Sequence[str] = (),
) -> str:
    """The page as Markdown. `traces` describes each trace in a line, `plots` are links to pictures."""
    lines = [*_HEAD.splitlines(), f"Version {__version__}, engine `{engine}`, seed 0.", ""]
    lines += ["## In short", "", *_short(cells), ""]
    if reading:
        lines += [*reading.strip().splitlines(), ""]
    lines += [line for plot in plots for line in (f"![{plot.rpartition('/')[2]}]({plot})", "")]
    everywhere = [cell for cell in cells if cell.policy in MOST]
    lines += ["## All conditions", "", *_summary(everywhere), ""]
    full = {condition.name for condition in conditions if condition.policies == COMPARED}
    lines += [f"## All policies: {', '.join(sorted(full))}", ""]
    lines += [*_summary([cell for cell in cells if cell.condition in full]), ""]
    lines += ["## Where our default loses", "", *_losses(cells), ""]
    lines += ["## Conditions", "", "| condition | |", "|---|---|"]
    lines += [f"| {each.name} | {each.summary} |" for each in conditions]
    lines += ["", "## By trace", ""]
    for name, about in traces.items():
        lines += [f"### {name}", "", about, "", *_tables(cells, name)]
    return "\n".join(lines).rstrip() + "\n"


def _short(cells: Sequence[Cell]) -> Iterator[str]:
    """What the default is worth, in a few lines."""
    everywhere = [cell for cell in cells if cell.policy in MOST]
    means, tails = regrets(everywhere), regrets(everywhere, "ttft_p90_s")
    if DEFAULT not in means:
        return
    overall = {name: geometric_mean([each[0] for each in found]) for name, found in means.items()}
    rivals = [name for name in overall if name not in OURS]
    yield f"- `{DEFAULT}` is best, or within 5 % of the best, in mean time to first token in {_near(means)} cells,"
    yield f"  and in p90 in {_near(tails)}. A cell is a trace under a condition."
    worst, trace, condition = means[DEFAULT][0]
    yield f"- Its worst cell is {trace}, {condition}: {worst:.2f} times the best."
    if rivals:
        best = min(rivals, key=overall.__getitem__)
        gain = 1 - overall[DEFAULT] / overall[best]
        yield f"- Over all cells its mean time to first token is {gain:.0%} below that of the best single rival,"
        yield f"  `{best}` (geometric mean)."


def _near(found: Mapping[str, Sequence[tuple[float, str, str]]]) -> str:
    values = [each[0] for each in found[DEFAULT]]
    return f"{sum(value <= _WITHIN for value in values)} of {len(values)}"


def _summary(cells: Sequence[Cell]) -> Iterator[str]:
    yield from wrap(
        "Time to first token in multiples of the best policy's in the same cell: the geometric mean, the worst, and how "
        f"often a policy is within {_WITHIN - 1:.0%} of the best. Bounds come last, and do not count as the best.",
        _WIDTH,
    )
    yield ""
    yield "| policy | mean | worst | where | within 5 % | p90 | worst p90 | within 5 % | hit rate, usual |"
    yield "|---|---|---|---|---|---|---|---|---|"
    means, tails = regrets(cells), regrets(cells, "ttft_p90_s")
    order = sorted(means, key=lambda name: (name in BOUNDS, geometric_mean([each[0] for each in means[name]])))
    for name in order:
        values, tail = [each[0] for each in means[name]], [each[0] for each in tails.get(name, [])]
        worst, trace, condition = means[name][0]
        hits = [cell.value("hit_rate") for cell in cells if cell.policy == name and cell.condition == USUAL]
        shown = f"**{name}**" if name in OURS else name
        yield (
            f"| {shown} | {geometric_mean(values):.3f} | {worst:.2f} | {trace}, {condition} "
            f"| {sum(value <= _WITHIN for value in values)} of {len(values)} "
            f"| {geometric_mean(tail):.3f} | {max(tail, default=0.0):.2f} "
            f"| {sum(value <= _WITHIN for value in tail)} of {len(tail)} | {sum(hits) / max(1, len(hits)):.3f} |"
        )


def _losses(cells: Sequence[Cell]) -> Iterator[str]:
    yield "Mean time to first token more than 5 % above that of the best rival:"
    yield ""
    yield "| trace | condition | mean TTFT, multiple of the best | best policy | hit rate: ours, best |"
    yield "|---|---|---|---|---|"
    found = []
    for (trace, condition), group in grouped(cells).items():
        rivals = [cell for cell in group if cell.policy not in (*BOUNDS, *OURS)]
        if not rivals:
            continue
        best = min(rivals, key=lambda cell: cell.value("ttft_mean_s"))
        for cell in group:
            ratio = cell.value("ttft_mean_s") / best.value("ttft_mean_s")
            if cell.policy == DEFAULT and ratio > _WITHIN:
                hits = f"{cell.value('hit_rate'):.3f}, {best.value('hit_rate'):.3f}"
                found.append((ratio, f"| {trace} | {condition} | {ratio:.2f} | {best.policy} | {hits} |"))
    yield from [line for _, line in sorted(found, reverse=True)[:_MOST_LOSSES]]
    if len(found) > _MOST_LOSSES:
        yield ""
        yield f"And {len(found) - _MOST_LOSSES} more, with smaller ratios."


def _tables(cells: Sequence[Cell], trace: str) -> Iterator[str]:
    groups = {condition: group for (name, condition), group in grouped(cells).items() if name == trace}
    if USUAL in groups:
        yield "| policy | " + " | ".join(_COLUMNS) + " |"
        yield "|---" * (len(_COLUMNS) + 1) + "|"
        for cell in groups[USUAL]:
            yield f"| {cell.policy} | " + " | ".join(_figure(cell.results.get(key)) for key in _COLUMNS) + " |"
        yield ""
    names = [name for name in groups if name != USUAL]
    if not names:
        return
    yield "Hit rate / mean time to first token in seconds:"
    yield ""
    yield "| policy | " + " | ".join(names) + " |"
    yield "|---" * (len(names) + 1) + "|"
    for policy in dict.fromkeys(cell.policy for name in names for cell in groups[name]):
        by_name = {name: cell for name in names for cell in groups[name] if cell.policy == policy}
        shown = [_pair(by_name[name]) if name in by_name else "" for name in names]
        yield f"| {policy} | " + " | ".join(shown) + " |"
    yield ""


def _pair(cell: Cell) -> str:
    return f"{cell.value('hit_rate'):.3f} / {_figure(cell.results['ttft_mean_s'])}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
