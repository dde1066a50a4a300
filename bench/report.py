"""Figures as JSON and as tables."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.measure import Figure

Results = Mapping[str, Sequence[Figure]]


def as_data(results: Results) -> dict[str, object]:
    """All figures by part, and the machine that they were measured on."""
    return {
        "machine": {
            "cpus": os.cpu_count(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("aiohttp", "gigatoken", "tokenizers", "uvloop")},
        },
        "parts": {
            part: [
                {
                    "case": figure.case,
                    "name": figure.name,
                    "value": figure.value,
                    "unit": figure.unit,
                    "target": figure.target,
                    "met": figure.met,
                }
                for figure in figures
            ]
            for part, figures in results.items()
        },
    }


def publish(results: Results, file: Path | None, *, as_json: bool) -> None:
    """Write the figures as JSON to `file`, if there is one, and print them as JSON or as tables."""
    data = json.dumps(as_data(results), indent=2, ensure_ascii=False)
    if file is not None:
        file.parent.mkdir(exist_ok=True)
        file.write_text(data + "\n", encoding="utf-8")
    if as_json:
        print(data)
    else:
        show(results)


def show(results: Results) -> None:
    """Print one table per part. A figure with a target shows the target, and whether it is met."""
    console = Console()
    if not console.is_terminal:
        console.width = 120
    for part, figures in results.items():
        names = list(dict.fromkeys(figure.name for figure in figures))
        table = Table("", title=part, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in names:
            units = {figure.unit for figure in figures if figure.name == name}
            table.add_column(f"{name}\n{'/'.join(sorted(units))}", justify="right")
        for case in dict.fromkeys(figure.case for figure in figures):
            cells = {figure.name: _cell(figure) for figure in figures if figure.case == case}
            table.add_row(case, *(cells.get(name, Text()) for name in names))
        console.print(table)


def _cell(figure: Figure) -> Text:
    text = Text(_number(figure.value))
    if figure.target is not None:
        mark, style = ("✓", "green") if figure.met else ("✗", "red")
        text.append(f"\n≤{figure.target:g} {mark}", style=style)
    return text


def _number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
