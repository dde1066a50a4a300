"""The results of all scenarios. `python -m tests.vllm.results FOLDER` prints the table of docs/accuracy.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(slots=True)
class Tally:
    """Counts of predicted hits compared with reported hits."""

    compared: int = 0
    exact: int = 0
    over: int = 0
    """Predictions above the reported hit."""
    largest_error: int = 0
    """In tokens, above or below."""

    def add(self, predicted: int, cached: int) -> None:
        """Count one more request."""
        self.compared += 1
        self.exact += predicted == cached
        self.over += predicted > cached
        self.largest_error = max(self.largest_error, abs(predicted - cached))


@dataclass
class Results:
    """The tallies of one run, in the order of the scenarios."""

    version: str
    tallies: dict[str, Tally] = field(default_factory=dict)

    def of(self, scenario: str) -> Tally:
        """The tally of a scenario; a new one if there is none."""
        return self.tallies.setdefault(scenario, Tally())

    def write(self, file: Path) -> None:
        """Write the results as JSON."""
        rows = {name: asdict(tally) for name, tally in self.tallies.items()}
        file.write_text(json.dumps({"vllm": self.version, "scenarios": rows}, indent=2) + "\n")


def read(file: Path) -> Results:
    """Read a file that `Results.write` wrote."""
    kept = json.loads(file.read_text())
    return Results(kept["vllm"], {name: Tally(**row) for name, row in kept["scenarios"].items()})


def table(runs: Mapping[str, Results]) -> list[str]:
    """A table in Markdown: one row per scenario, three columns per version."""
    names = dict.fromkeys(name for run in runs.values() for name in run.tallies)
    heads = (head for version in runs for head in (f"{version}: exact", "over", "largest error"))
    return [
        f"| scenario | {' | '.join(heads)} |",
        "|---" + "|---:" * (3 * len(runs)) + "|",
        *(f"| {name} | {' | '.join(_cells(run.tallies.get(name)) for run in runs.values())} |" for name in names),
    ]


def _cells(tally: Tally | None) -> str:
    if tally is None:
        return "| |"
    return f"{tally.exact} of {tally.compared} | {tally.over} | {tally.largest_error}"


if __name__ == "__main__":
    kept = sorted((read(file) for file in Path(sys.argv[1]).glob("accuracy-*.json")), key=lambda run: run.version)
    print("\n".join(table({run.version: run for run in reversed(kept)})))
