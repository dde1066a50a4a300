"""Figures as JSON and as tables."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.measure import Figure

Results = Mapping[str, Sequence[Figure]]


def as_data(results: Results, seconds: Mapping[str, float]) -> dict[str, object]:
    """All figures by part, the seconds that each part took, and the machine that they were measured on."""
    return {
        "machine": {
            "cpus": os.cpu_count(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("aiohttp", "gigatoken", "tokenizers", "uvloop")},
        },
        "seconds": {part: round(took, 1) for part, took in seconds.items()},
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


def publish(
    results: Results, file: Path | None, *, as_json: bool, seconds: Mapping[str, float] = MappingProxyType({})
) -> None:
    """Write the figures as JSON to `file`, if there is one, and print them as JSON or as tables.

    `seconds` says how long each part took, where that was measured.
    """
    data = json.dumps(as_data(results, seconds), indent=2, ensure_ascii=False)
    if file is not None:
        file.parent.mkdir(exist_ok=True)
        file.write_text(data + "\n", encoding="utf-8")
    if as_json:
        print(data)
    else:
        show(results, seconds)


def show(results: Results, seconds: Mapping[str, float]) -> None:
    """Print one table per part, with the time that it took. A figure with a target shows the target, and whether it is met."""
    console = Console()
    if not console.is_terminal:
        console.width = 120
    for part, figures in results.items():
        names = list(dict.fromkeys(figure.name for figure in figures))
        took = f"measured in {seconds[part]:.0f} s" if part in seconds else None
        table = Table("", title=part, caption=took, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
        table.pad_edge = False
        for name in names:
            units = {figure.unit for figure in figures if figure.name == name}
            table.add_column(f"{name}\n{'/'.join(sorted(units))}", justify="right")
        for case in dict.fromkeys(figure.case for figure in figures):
            cells = {figure.name: _cell(figure) for figure in figures if figure.case == case}
            table.add_row(case, *(cells.get(name, Text()) for name in names))
        console.print(table)
    if len(seconds) > 1:
        console.print(f"all parts: {sum(seconds.values()):.0f} s")


def _cell(figure: Figure) -> Text:
    text = Text(_number(figure.value))
    if figure.target is not None:
        mark, style = ("✓", "green") if figure.met else ("✗", "red")
        text.append(f"\n≤{figure.target:g} {mark}", style=style)
    return text


def _number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
