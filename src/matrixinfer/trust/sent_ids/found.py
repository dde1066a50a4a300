"""What was found about an engine and token ids. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Outcome: TypeAlias = Literal["honoured", "ignored", "refused", "differs", "failed"]
"""`ignored`: the engine answers the messages beside the ids. `differs`: what it makes of the ids is not what it makes of
the prompt. `failed`: it did not answer, which says nothing about token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What an engine does with token ids at one path."""

    path: str
    outcome: Outcome
    why: str | None = None
    """In words, unless it is `honoured`."""
