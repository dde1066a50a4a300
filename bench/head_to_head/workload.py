"""Conversations that clients hold at the same time: what they say, when they begin, and how long they think. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from bench.prompts import prose

_SYSTEM_CHARS = (3_200, 4_400, 5_600, 6_400)
"""The length of the system prompt of each group."""
_PER_GROUP, _TURNS = 6, (5, 8)
_QUESTION_CHARS, _ANSWER_CHARS = (150, 900), (200, 1_100)
_START_SECONDS, _THINK_SECONDS = 10.0, 6.5
"""Conversations begin within the first, and a client thinks for the second on average, for three times that at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One client's conversation. Its answers are given, so that every router gets the same prompts."""

    name: str
    start: float
    """Seconds after the run has begun."""
    turns: Sequence[Sequence[dict[str, str]]]
    """The messages of each request."""
    thinks: Sequence[float]
    """Seconds between each answer and the next request."""


def conversations(seed: int, *, per_group: int = _PER_GROUP) -> list[Conversation]:
    """Groups that share a system prompt, in random order: with 24 conversations 150 to 170 requests of 2,000 tokens."""
    draw = random.Random(seed)
    found = []
    for group, chars in enumerate(_SYSTEM_CHARS):
        system = {"role": "system", "content": prose(seed * 100 + group, chars)}
        found += [_conversation(draw, f"{group}-{number}", system) for number in range(per_group)]
    return sorted(found, key=lambda each: each.start)


def _conversation(draw: random.Random, name: str, system: dict[str, str]) -> Conversation:
    text = prose(draw.getrandbits(30), 40_000)
    at, messages, turns = 0, [system], []
    for _ in range(draw.randint(*_TURNS)):
        for role, lengths in (("user", _QUESTION_CHARS), ("assistant", _ANSWER_CHARS)):
            length = draw.randint(*lengths)
            if role == "assistant":
                turns.append(tuple(messages))
            messages.append({"role": role, "content": text[at : at + length]})
            at += length
    thinks = [min(draw.expovariate(1 / _THINK_SECONDS), 3 * _THINK_SECONDS) for _ in turns]
    return Conversation(name=name, start=draw.uniform(0.0, _START_SECONDS), turns=turns, thinks=thinks)
