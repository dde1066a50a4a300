"""Conversations in real text: several applications, each with its own system prompt, over many turns."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pydoc_data.topics import topics


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """The messages of one user: a system prompt shared with others, then one message per turn."""

    system: str
    turns: tuple[str, ...]
    starts_after: float
    """Seconds from the start of the workload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadShape:
    """Number and length of the conversations, and how much text they share. Lengths are in characters."""

    conversations: int = 36
    turns: int = 6
    applications: int = 4
    system_chars: int = 6_000
    turn_chars: int = 2_400
    ramp_seconds: float = 6.0
    """Conversations start at random times within this many seconds."""
    seed: int = 0


def conversations(shape: WorkloadShape) -> list[Conversation]:
    """The conversations of a workload, by start time. Equal shapes give equal workloads."""
    draw = random.Random(shape.seed)
    prose = _Prose(draw)
    systems = [f"You are assistant {i}.\n{prose.cut(shape.system_chars)}" for i in range(shape.applications)]
    plan = [
        Conversation(
            system=systems[i % len(systems)],
            turns=tuple(
                f"Question {i}.{turn}: {prose.cut(draw.randint(shape.turn_chars // 2, shape.turn_chars * 3 // 2))}"
                for turn in range(shape.turns)
            ),
            starts_after=draw.uniform(0, shape.ramp_seconds),
        )
        for i in range(shape.conversations)
    ]
    return sorted(plan, key=lambda conversation: conversation.starts_after)


class _Prose:
    """Consecutive pieces of the Python language reference, shuffled by topic."""

    def __init__(self, draw: random.Random) -> None:
        names = sorted(topics)
        draw.shuffle(names)
        self._text = "\n".join(topics[name] for name in names)
        self._at = 0

    def cut(self, length: int) -> str:
        start = self._at % max(1, len(self._text) - length)
        self._at += length
        return self._text[start : start + length]


def messages(conversation: Conversation, replies: list[str]) -> list[dict[str, str]]:
    """The messages of the request that follows `replies`."""
    chat = [{"role": "system", "content": conversation.system}]
    for question, reply in zip(conversation.turns, replies, strict=False):
        chat += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return [*chat, {"role": "user", "content": conversation.turns[len(replies)]}]
