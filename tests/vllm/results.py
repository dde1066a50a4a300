"""What was compared, scenario by scenario. `python -m tests.vllm.results FOLDER` prints the table of docs/accuracy.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(slots=True)
class Tally:
    """Predictions held against what engines found."""

    compared: int = 0
    exact: int = 0
    over: int = 0
    """The index claimed more than there was."""
    largest_error: int = 0
    """In tokens, either way."""

    def note(self, predicted: int, cached: int) -> None:
        """One more request."""
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
        """The tally of a scenario, which begins with its first request."""
        return self.tallies.setdefault(scenario, Tally())

    def write(self, file: Path) -> None:
        """Keep them as JSON."""
        rows = {name: asdict(tally) for name, tally in self.tallies.items()}
        file.write_text(json.dumps({"vllm": self.version, "scenarios": rows}, indent=2) + "\n")


def read(file: Path) -> Results:
    """What `Results.write` has kept."""
    kept = json.loads(file.read_text())
    return Results(kept["vllm"], {name: Tally(**row) for name, row in kept["scenarios"].items()})


def table(runs: Mapping[str, Results]) -> list[str]:
    """A table in Markdown: the scenarios, and columns for each version."""
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
