"""Writes docs/evaluation.md from the results of the matrix: what wins, where we lose, and every figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from matrixinfer import __version__
from matrixinfer.study.matrix import BOUNDS, CONDITIONS, OURS, USUAL, Cell, Condition, geometric_mean, grouped, regrets

_COLUMNS = ("hit_rate", "ttft_mean_s", "ttft_p90_s", "ttft_p99_s", "tpot_s", "imbalance")
_WITHIN = 1.05
_MOST_LOSSES = 20

_HEAD = """# Evaluation

Which routing policy is best, on which traffic, and where is ours not? `make study TRACES=folder`
replays every trace in a folder, and generated traffic, as [Replay](replay.md) describes, and writes
this page. Do not edit it.

The engine is a model with derived times: compare policies, and do not plan capacity with these
figures. Each trace has as many pods, 4 to 16, as would be half busy if every hit were found.

"""


def page(
    cells: Sequence[Cell], traces: Mapping[str, str], engine: str, conditions: Sequence[Condition] = CONDITIONS
) -> str:
    """The page as Markdown. `traces` describes each trace in a line."""
    lines = [*_HEAD.splitlines(), f"Version {__version__}, engine `{engine}`, seed 0.", ""]
    lines += ["## In short", "", *_summary(cells), ""]
    lines += ["## Where our profiles lose", "", *_losses(cells), ""]
    lines += ["## Conditions", "", "| condition | |", "|---|---|"]
    lines += [f"| {each.name} | {each.summary} |" for each in conditions]
    lines += ["", "## By trace", ""]
    for name, about in traces.items():
        lines += [f"### {name}", "", about, "", *_tables(cells, name)]
    return "\n".join(lines).rstrip() + "\n"


def _summary(cells: Sequence[Cell]) -> Iterator[str]:
    yield "Mean time to first token in multiples of the best policy's for the same trace and condition: the"
    yield f"geometric mean, the worst, and how often a policy is within {_WITHIN - 1:.0%} of the best. Bounds come last,"
    yield "and do not count as the best."
    yield ""
    yield "| policy | geometric mean | worst | where | within 5 % | p90: geometric mean | hit rate, usual |"
    yield "|---|---|---|---|---|---|---|"
    means, tails = regrets(cells), regrets(cells, "ttft_p90_s")
    order = sorted(means, key=lambda name: (name in BOUNDS, geometric_mean([each[0] for each in means[name]])))
    for name in order:
        values = [each[0] for each in means[name]]
        worst, trace, condition = means[name][0]
        within = sum(value <= _WITHIN for value in values)
        hits = [cell.value("hit_rate") for cell in cells if cell.policy == name and cell.condition == USUAL]
        tail = geometric_mean([each[0] for each in tails.get(name, [])])
        shown = f"**{name}**" if name in OURS else name
        yield (
            f"| {shown} | {geometric_mean(values):.3f} | {worst:.2f} | {trace}, {condition} | {within} of {len(values)} "
            f"| {tail:.3f} | {sum(hits) / max(1, len(hits)):.3f} |"
        )


def _losses(cells: Sequence[Cell]) -> Iterator[str]:
    yield "| profile | trace | condition | mean TTFT, multiple of the best | best policy | hit rate: ours, best |"
    yield "|---|---|---|---|---|---|"
    found = []
    for (trace, condition), group in grouped(cells).items():
        rivals = [cell for cell in group if cell.policy not in (*BOUNDS, *OURS)]
        if not rivals:
            continue
        best = min(rivals, key=lambda cell: cell.value("ttft_mean_s"))
        for cell in group:
            ratio = cell.value("ttft_mean_s") / best.value("ttft_mean_s")
            if cell.policy in OURS and ratio > _WITHIN:
                hits = f"{cell.value('hit_rate'):.3f}, {best.value('hit_rate'):.3f}"
                found.append(
                    (ratio, f"| {cell.policy} | {trace} | {condition} | {ratio:.2f} | {best.policy} | {hits} |")
                )
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
