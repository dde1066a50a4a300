"""What an engine is asked to find out its times: bounded, and in an order that an early end leaves useful. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from matrixinfer.study.calibration.fit import CalibrationError

_LENGTHS = (64, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768)
_BATCHES = (1, 2, 4, 8, 16, 32)
_SHORT = 64
_LEAST_LONG = 256
_CACHE_SHARE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """So many requests at the same time."""

    requests: int
    prompt: int
    reply: int
    """Tokens; a task with replies of one token measures the prefill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an engine can take."""

    context: int
    """Longest prompt with its reply, in tokens."""
    cache_tokens: int | None
    """Size of the KV cache; None if the engine does not say it."""
    max_sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All tasks, in order."""

    tasks: Sequence[Task]

    @property
    def requests(self) -> int:
        """Number of all requests."""
        return sum(task.requests for task in self.tasks)

    @property
    def tokens(self) -> int:
        """Tokens of all prompts and replies."""
        return sum(task.requests * (task.prompt + task.reply) for task in self.tasks)

    @property
    def together(self) -> int:
        """Most requests at the same time."""
        return max(task.requests for task in self.tasks)


def plan(limits: Limits, *, longest: int = 8192, most_together: int = 32, reply: int = 128, repeats: int = 4) -> Plan:
    """Plan for an engine. Raises `CalibrationError` if it takes too short prompts."""
    top = min(longest, limits.context - reply, int(_CACHE_SHARE * (limits.cache_tokens or limits.context)))
    lengths = [length for length in _LENGTHS if length <= top]
    if len(lengths) < 3:
        raise CalibrationError(f"expected an engine that takes prompts of 512 tokens, got one that takes {top}")
    room = _CACHE_SHARE * (limits.cache_tokens or limits.context)
    tasks = [Task(requests=1, prompt=_SHORT, reply=reply)]
    for _ in range(repeats):
        tasks += [Task(requests=1, prompt=length, reply=1) for length in lengths]
    batches = [each for each in _BATCHES if each <= min(most_together, limits.max_sequences)]
    for _ in range(max(1, repeats // 2)):
        tasks += _decodes(batches, top, room, reply)
    return Plan(tasks=tasks)


def _decodes(batches: Sequence[int], top: int, room: float, reply: int) -> Iterator[Task]:
    """Each batch with short prompts, and with prompts as long as fit."""
    long = max(_LEAST_LONG, top // 2)
    for batch in batches:
        for prompt in (_SHORT, min(long, int(room / batch) - reply)):
            if prompt >= _SHORT and batch * (prompt + reply) <= room:
                yield Task(requests=batch, prompt=prompt, reply=reply)
