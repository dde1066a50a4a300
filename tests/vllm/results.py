"""What was compared, scenario by scenario: for the table of docs/accuracy.md."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
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
        rows = {
            name: {
                "compared": tally.compared,
                "exact": tally.exact,
                "over": tally.over,
                "largest_error_tokens": tally.largest_error,
            }
            for name, tally in self.tallies.items()
        }
        file.write_text(json.dumps({"vllm": self.version, "scenarios": rows}, indent=2) + "\n")

    def lines(self) -> list[str]:
        """A table in Markdown."""
        rows = [
            f"| {name} | {tally.compared} | {tally.exact} | {tally.over} | {tally.largest_error} |"
            for name, tally in self.tallies.items()
        ]
        return ["| scenario | compared | exact | over | largest error |", "|---|---:|---:|---:|---:|", *rows]
