"""Traffic that is drawn with a seed, for what no recording shows."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from matrixinfer.errors import ConfigError
from matrixinfer.study.trace import Alphabet, Trace, Turn, filled

_BLOCK = 16
_POSITIVE = {"rate": 0.001, "groups": 1, "applications": 1, "templates": 1, "requests": 1, "sessions": 1}
"""The least values of parameters that cannot be 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generator:
    """A kind of traffic, its parameters with their defaults, and what it draws."""

    summary: str
    defaults: Mapping[str, float]
    draw: Callable[[_Drawing], None]


class _Drawing:
    """A trace while it is drawn."""

    def __init__(self, settings: Mapping[str, float], seed: int) -> None:
        self.settings = settings
        self.rng = random.Random(seed)  # noqa: S311  # a simulation
        self.alphabet = Alphabet()
        self.turns: list[Turn] = []

    def count(self, key: str) -> int:
        """A parameter that is a whole number."""
        return int(self.settings[key])

    def around(self, key: str) -> int:
        """A number of tokens, between half of the parameter and one and a half times it."""
        mean = self.settings[key]
        return max(1, round(self.rng.uniform(mean / 2, mean * 3 / 2)))

    def wait(self, mean: float) -> float:
        """Seconds, exponentially distributed."""
        return self.rng.expovariate(1 / mean) if mean else 0.0

    def text(self, tokens: int) -> Text:
        """New content of so many tokens."""
        return Text(self.alphabet.new(tokens // _BLOCK + 1), tokens)

    def ask(self, session: str, prompt: Text, reply: int, *, delay: float, after: int | None = None) -> int:
        """Append a request, and return its position."""
        word = filled(prompt.letters[: prompt.tokens // _BLOCK], prompt.tokens, reply, _BLOCK, self.alphabet)
        self.turns.append(
            Turn(session=session, delay=delay, after=after, prompt=prompt.tokens, reply=reply, letters=word)
        )
        return len(self.turns) - 1

    def answered(self, position: int) -> Text:
        """The prompt of a request with its answer."""
        turn = self.turns[position]
        tokens = turn.prompt + turn.reply
        return Text(array("I", turn.letters), tokens)


@dataclass(frozen=True, slots=True)
class Text:
    """Content, and how many tokens it has. Its last block may be of it only in part."""

    letters: array[int]
    tokens: int

    def then(self, more: int, drawing: _Drawing) -> Text:
        """This content, and then so many new tokens. The blocks that are full already stay."""
        tokens = self.tokens + more
        full = self.letters[: self.tokens // _BLOCK]
        return Text(full + drawing.alphabet.new(tokens // _BLOCK - len(full)), tokens)


def generate(text: str, *, seed: int) -> Trace:
    """The trace that `NAME` or `NAME:KEY=VALUE,…` describes. Raises `ConfigError`."""
    name, _, given = text.partition(":")
    if name not in GENERATORS:
        raise ConfigError(
            "TRACE", f"no file `{text}`, and no generator of that name; there are: {', '.join(GENERATORS)}"
        )
    generator = GENERATORS[name]
    settings = dict(generator.defaults)
    for part in filter(None, given.split(",")):
        key, _, value = part.partition("=")
        if key not in settings:
            raise ConfigError("TRACE", f"`{name}` has no parameter `{key}`; there are: {', '.join(settings)}")
        try:
            settings[key] = float(value)
        except ValueError:
            raise ConfigError("TRACE", f"expected a number for `{key}` of `{name}`, got `{value}`") from None
        if not 0 <= settings[key] < math.inf or (key in _POSITIVE and settings[key] < _POSITIVE[key]):
            least = _POSITIVE.get(key, 0)
            raise ConfigError("TRACE", f"expected at least {least} for `{key}` of `{name}`, got {value}")
    drawing = _Drawing(settings, seed)
    generator.draw(drawing)
    return Trace(name=text, block_size=_BLOCK, turns=drawing.turns, settings={**settings, "seed": seed})


def _shared_prefix(drawing: _Drawing) -> None:
    prefixes = [drawing.text(drawing.count("prefix_tokens")) for _ in range(drawing.count("groups"))]
    order = [group for group in range(len(prefixes)) for _ in range(drawing.count("requests"))]
    drawing.rng.shuffle(order)
    now = 0.0
    for number, group in enumerate(order):
        now += drawing.wait(1 / drawing.settings["rate"])
        prompt = prefixes[group].then(drawing.around("question_tokens"), drawing)
        drawing.ask(f"request-{number}", prompt, drawing.around("reply_tokens"), delay=now)


def _multi_round(drawing: _Drawing) -> None:
    systems = [drawing.text(drawing.count("system_tokens")) for _ in range(drawing.count("applications"))]
    now = 0.0
    for number in range(drawing.count("sessions")):
        now += drawing.wait(drawing.settings["interval"])
        text, after = drawing.rng.choice(systems), None
        for _ in range(drawing.count("turns")):
            prompt = text.then(drawing.around("question_tokens"), drawing)
            delay = now if after is None else drawing.wait(drawing.settings["think"])
            after = drawing.ask(f"session-{number}", prompt, drawing.around("reply_tokens"), delay=delay, after=after)
            text = drawing.answered(after)


def _agent_loop(drawing: _Drawing) -> None:
    system = drawing.text(drawing.count("system_tokens"))
    now = 0.0
    for number in range(drawing.count("sessions")):
        now += drawing.wait(drawing.settings["interval"])
        name, text, after = f"session-{number}", system, None
        for step in range(drawing.count("steps")):
            prompt = text.then(drawing.around("tool_tokens"), drawing)
            delay = now if after is None else drawing.wait(drawing.settings["tool_seconds"])
            after = drawing.ask(name, prompt, drawing.around("reply_tokens"), delay=delay, after=after)
            text = drawing.answered(after)
            if step == drawing.count("steps") // 2:
                for _ in range(drawing.count("sub_agents")):
                    _sub_agent(drawing, name, text, after)


def _sub_agent(drawing: _Drawing, name: str, text: Text, after: int) -> None:
    """Sub-agents start together, each from all that the main agent knows."""
    for step in range(3):
        prompt = text.then(drawing.around("tool_tokens"), drawing)
        delay = drawing.wait(drawing.settings["tool_seconds"]) if step else 0.0
        after = drawing.ask(name, prompt, drawing.around("reply_tokens"), delay=delay, after=after)
        text = drawing.answered(after)


def _templates(drawing: _Drawing) -> None:
    templates = [drawing.text(drawing.count("template_tokens")) for _ in range(drawing.count("templates"))]
    for number in range(drawing.count("requests")):
        template = templates[number * len(templates) // drawing.count("requests")]
        prompt = template.then(drawing.around("record_tokens"), drawing)
        drawing.ask(
            f"request-{number}", prompt, drawing.around("reply_tokens"), delay=number / drawing.settings["rate"]
        )


GENERATORS: Mapping[str, Generator] = MappingProxyType(
    {
        "shared-prefix": Generator(
            summary="groups of requests with one long prefix each, in random order",
            defaults={
                "groups": 64,
                "requests": 16,
                "prefix_tokens": 2048,
                "question_tokens": 128,
                "reply_tokens": 256,
                "rate": 16,
            },
            draw=_shared_prefix,
        ),
        "multi-round": Generator(
            summary="chats over several turns, some of which share a system prompt",
            defaults={
                "sessions": 128,
                "turns": 6,
                "applications": 4,
                "system_tokens": 1024,
                "question_tokens": 256,
                "reply_tokens": 256,
                "interval": 1,
                "think": 10,
            },
            draw=_multi_round,
        ),
        "agent-loop": Generator(
            summary="agents that call tools, and send out sub-agents that start from what they know",
            defaults={
                "sessions": 48,
                "steps": 16,
                "sub_agents": 4,
                "system_tokens": 8192,
                "tool_tokens": 1024,
                "reply_tokens": 192,
                "interval": 3,
                "tool_seconds": 2,
            },
            draw=_agent_loop,
        ),
        "template-batch": Generator(
            summary="a batch job: one template after the other over many records, at a constant rate",
            defaults={
                "requests": 1024,
                "templates": 4,
                "template_tokens": 4096,
                "record_tokens": 256,
                "reply_tokens": 64,
                "rate": 16,
            },
            draw=_templates,
        ),
    }
)
"""By name."""
