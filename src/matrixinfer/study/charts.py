"""The plots of an evaluation: each policy against the best, and the default against the best rival in each cell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from matrixinfer.study.matrix import BOUNDS, DEFAULT, MOST, OURS, Cell, geometric_mean, grouped, regrets

_DPI = 75


def charts(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """Write the plots to `folder`, and return the files; none if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  # an extra, and slow to import
    except ImportError:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, size, draw in (("policies", (9, 4), _policies), ("cells", (10, 5.5), _cells)):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, cells)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=_DPI)
        files.append(path)
    return files


def _policies(figure: Any, cells: Sequence[Cell]) -> None:
    """Bars: the geometric mean over all cells, by policy; a line up to the worst cell."""
    compared = [cell for cell in cells if cell.policy in MOST]
    axes = figure.add_subplot()
    means, tails = regrets(compared), regrets(compared, "ttft_p90_s")
    order = sorted(means, key=lambda name: geometric_mean([each[0] for each in means[name]]))
    for shift, found, label in ((-0.2, means, "mean"), (0.2, tails, "p90")):
        heights = [geometric_mean([each[0] for each in found[name]]) for name in order]
        at = np.arange(len(order)) + shift
        axes.bar(at, heights, 0.38, label=f"{label} time to first token")
        axes.vlines(at, heights, [found[name][0][0] for name in order], color="0.4", linewidth=1)
    axes.axhline(1.0, color="0.2", linewidth=0.8)
    axes.set(yscale="log", ylabel="multiple of the best policy's")
    axes.set_title("All traces and conditions: geometric mean, and the worst cell (line)")
    axes.set_xticks(range(len(order)), order)
    axes.legend(loc="upper left")


def _cells(figure: Any, cells: Sequence[Cell]) -> None:
    """A grid: the default's mean time to first token in multiples of the best rival's."""
    groups = grouped(cells)
    traces = list(dict.fromkeys(trace for trace, _ in groups))
    conditions = list(dict.fromkeys(condition for _, condition in groups))
    grid = np.full((len(traces), len(conditions)), np.nan)
    for (trace, condition), group in groups.items():
        ours = [cell.value("ttft_mean_s") for cell in group if cell.policy == DEFAULT]
        rivals = [cell.value("ttft_mean_s") for cell in group if cell.policy not in (*OURS, *BOUNDS)]
        if ours and rivals:
            grid[traces.index(trace), conditions.index(condition)] = ours[0] / min(rivals)
    axes = figure.add_subplot()
    axes.imshow(np.log2(grid), cmap="RdYlGn_r", vmin=-1, vmax=1, aspect="auto")
    for (row, column), ratio in np.ndenumerate(grid):
        if not np.isnan(ratio):
            axes.text(column, row, f"{ratio:.2f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(conditions)), conditions, rotation=30, ha="right")
    axes.set_yticks(range(len(traces)), traces)
    axes.set_title(f"{DEFAULT}: mean time to first token in multiples of the best rival's in the same cell")
