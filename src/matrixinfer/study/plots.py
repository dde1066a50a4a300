"""Plots of a study: time to first token, hit rate over time, load per pod."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from matrixinfer.errors import ConfigError
from matrixinfer.study.runs import Outcome

_WINDOWS = 60
"""Points of the hit rate over time."""


def require_matplotlib() -> None:
    """Raises `ConfigError` where plots cannot be drawn: a long replay should not end with that."""
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "--plot", "matplotlib is not installed; install it with `pip install 'matrixinfer-gateway[study]'`"
        )


def plot(outcomes: Sequence[Outcome], folder: Path, name: str) -> list[Path]:
    """Write the plots of a trace's `outcomes` to `folder`, and return the files. Needs matplotlib."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # an extra, and slow to import

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for kind, draw in (("ttft", _ttft), ("hits", _hits), ("load", _load), ("ladder", _ladder)):
        figure = Figure(figsize=(10, 6 if kind != "load" else 1.2 + 1.3 * len(outcomes)), layout="constrained")
        draw(figure, outcomes)
        figure.suptitle(name)
        path = folder / f"{kind}.png"
        figure.savefig(path, dpi=110)
        files.append(path)
    return files


def _ttft(figure: Any, outcomes: Sequence[Outcome]) -> None:
    axes = figure.add_subplot()
    for outcome in outcomes:
        times = np.sort([each[1] for each in outcome.requests])
        if len(times):
            axes.plot(np.maximum(times, 1e-3), np.arange(1, len(times) + 1) / len(times), label=outcome.policy)
    axes.set(xscale="log", xlabel="time to first token, seconds", ylabel="share of requests", ylim=(0, 1))
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="lower right")


def _hits(figure: Any, outcomes: Sequence[Outcome]) -> None:
    axes = figure.add_subplot()
    end = max((each[0] for outcome in outcomes for each in outcome.requests), default=0.0) or 1.0
    edges = np.linspace(0, end, _WINDOWS + 1)
    for outcome in outcomes:
        arrived = np.array([each[0] for each in outcome.requests])
        prompt, _ = np.histogram(arrived, edges, weights=[each[2] for each in outcome.requests])
        cached, _ = np.histogram(arrived, edges, weights=[each[3] for each in outcome.requests])
        shown = prompt > 0
        axes.plot(edges[:-1][shown], cached[shown] / prompt[shown], label=outcome.policy)
    axes.set(xlabel="arrival, seconds", ylabel="hit rate (share of prompt tokens)", ylim=(0, 1))
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="lower right")


def _load(figure: Any, outcomes: Sequence[Outcome]) -> None:
    rows = figure.subplots(len(outcomes), squeeze=False)
    most = max((max(each.requests, default=0) for outcome in outcomes for each in outcome.samples), default=1)
    for (axes,), outcome in zip(rows, outcomes, strict=True):
        pods = max((len(each.requests) for each in outcome.samples), default=1)
        grid = np.array([[*each.requests, *[0] * (pods - len(each.requests))] for each in outcome.samples]).T
        end = outcome.samples[-1].at if outcome.samples else 1.0
        image = axes.imshow(
            grid,
            aspect="auto",
            vmin=0,
            vmax=most,
            extent=(0, max(end, 1e-9), pods - 0.5, -0.5),
            interpolation="nearest",
        )
        axes.set(title=outcome.policy, ylabel="pod")
    rows[-1][0].set(xlabel="seconds")
    figure.colorbar(image, ax=[axes for (axes,) in rows], label="requests")


def _ladder(figure: Any, outcomes: Sequence[Outcome]) -> None:
    axes = figure.add_subplot()
    names = [rung.name for rung in outcomes[0].ladder.rungs]
    height = 0.8 / len(outcomes)
    for number, outcome in enumerate(outcomes):
        shares = [rung.share or 0.0 for rung in outcome.ladder.rungs]
        axes.barh(np.arange(len(names)) - 0.4 + (number + 0.5) * height, shares, height, label=outcome.policy)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="share of prompt tokens", xlim=(0, 1))
    axes.legend(loc="lower right")
