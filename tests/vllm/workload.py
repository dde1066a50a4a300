"""Requests of many kinds, one at a time. Each function sends some and returns the answers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any

from .results import Tally
from .target import CHAT, COMPLETIONS, Answer, Target

WORDS = [
    "river",
    "stone",
    "lamp",
    "winter",
    "seven",
    "orange",
    "silent",
    "market",
    "bridge",
    "paper",
    "cloud",
    "engine",
    "violet",
    "corner",
    "harbor",
    "tale",
]
ODD = (
    "naïve café \u0065\u0301 日本語のテキスト " * 12,
    "<|im_start|>system\nno<|im_end|>\n" * 8,
    "😀👩‍👩‍👧 \u200b\u00a0  \n\n\t " * 20,
    "a\r\nb \r\n" * 30,
)
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "nothing"}},
]


def text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words))


def ids(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(1000, 90_000) for _ in range(count)]


async def texts(target: Target, tally: Tally, draw: random.Random) -> list[Answer]:
    """Each text three times, the last time with more text at the end."""
    prompts = [*ODD, *(text(draw, words) for words in (5, 20, 31, 64, 100, 300, 900))]
    return [
        await target.ask(tally, COMPLETIONS, {"prompt": prompt + more})
        for prompt in prompts
        for more in ("", "", " " + text(draw, 40))
    ]


async def conversations(target: Target, tally: Tally, draw: random.Random) -> list[Answer]:
    """Chats of several turns that include the generated replies; half of the turns are streamed."""
    answers = []
    for number in range(6):
        messages = [{"role": "system", "content": text(draw, 60)}] if number % 2 else []
        for turn in range(5):
            messages.append({"role": "user", "content": text(draw, draw.randrange(5, 80))})
            body: dict[str, Any] = {"messages": messages, "max_tokens": draw.randrange(10, 80)}
            if turn % 2:
                body |= {"stream": True, "stream_options": {"include_usage": True}}
            answers.append(await target.ask(tally, CHAT, body))
            messages.append({"role": "assistant", "content": answers[-1].text})
    return answers


async def tools(target: Target, tally: Tally, draw: random.Random) -> list[Answer]:
    """Tools, calls and their results, each twice."""
    question = [{"role": "user", "content": text(draw, 40)}]
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln", "n": 2.0}'}}
    called = [
        *question,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "rain " * 20},
    ]
    bodies: list[dict[str, Any]] = [
        {"messages": question, "tools": TOOLS},
        {"messages": question, "tools": TOOLS[:1], "tool_choice": "none"},
        {"messages": called, "tools": TOOLS},
        {"messages": called},
    ]
    return [await target.ask(tally, CHAT, body) for body in bodies for _ in range(2)]


async def salts(target: Target, tally: Tally, draw: random.Random) -> list[Answer]:
    """One prompt with several salts, and without."""
    prompt = text(draw, 150)
    long = "a long salt " * 10  # engines accept 128 characters
    names = ("A", "A", "B", None, None, "A", "B", long, long, "ü", "ü", None)
    answers = [
        await target.ask(tally, COMPLETIONS, {"prompt": prompt} | ({"cache_salt": name} if name else {}))
        for name in names
    ]
    assert [answer.cached > 0 for answer in answers] == [name in names[:i] for i, name in enumerate(names)]
    return answers


async def multiples(target: Target, tally: Tally, draw: random.Random, *, block: int = 32) -> list[Answer]:
    """Prompts of whole blocks, whose last block is stored twice, and of one token more or less."""
    prompts = [ids(draw, blocks * block) for blocks in (1, 2, 4, 8, 20)]
    return [
        await target.ask(tally, COMPLETIONS, {"prompt": each, "max_tokens": draw.choice([1, 4])})
        for prompt in prompts
        for each in (*repeat(prompt, 3), [*prompt, 5], prompt[:-1])
    ]


async def aborts(target: Target, tally: Tally, draw: random.Random) -> list[Answer]:
    """The client disconnects in the middle of a stream. The blocks stay cached."""
    answers = []
    for after in (1, 2, 20, 70) * 2:
        prompt = ids(draw, draw.randrange(40, 300))
        await target.abort(COMPLETIONS, {"prompt": prompt}, after=after)
        answers.append(await target.ask(tally, COMPLETIONS, {"prompt": prompt}))
    return answers


async def evictions(target: Target, tally: Tally, draw: random.Random, *, count: int = 100) -> list[Answer]:
    """More prefixes than fit in the caches, so that repeated ones may be evicted, in whole or in part."""
    prefixes = [ids(draw, draw.randrange(800, 2400)) for _ in range(20)]
    return [await target.ask(tally, COMPLETIONS, {"prompt": prompt}) for prompt in _cut(draw, prefixes, count)]


async def varied(
    target: Target, tally: Tally, draw: random.Random, *, count: int, block: int, tokens: int = 1500
) -> list[Answer]:
    """New prompts, and earlier ones as they were, cut anywhere or at a block, grown, or with a salt."""
    prompts = [few_ids(draw, draw.randrange(1, tokens)) for _ in range(3)]
    answers = []
    for _ in range(count):
        prompt, salt = _vary(draw, draw.choice(prompts), block, tokens), draw.choice((None, None, None, "s"))
        body = {"prompt": prompt, "max_tokens": draw.choice((1, 4, block + 3))} | ({"cache_salt": salt} if salt else {})
        answers.append(await target.ask(tally, COMPLETIONS, body))
        prompts = [*prompts[-40:], prompt]
    return answers


def _vary(draw: random.Random, prompt: list[int], block: int, tokens: int) -> list[int]:
    whole = len(prompt) // block * block
    match draw.randrange(6):
        case 0:
            return few_ids(draw, draw.randrange(1, tokens))
        case 1:
            return prompt
        case 2:
            return prompt[: draw.randrange(len(prompt)) + 1]
        case 3:
            return prompt[: max(1, min(whole, draw.randrange(len(prompt)) // block * block) + draw.choice((-1, 0, 1)))]
        case _:
            return [*prompt[: draw.choice((whole, len(prompt)))], *few_ids(draw, draw.randrange(1, 200))][: 2 * tokens]


def few_ids(draw: random.Random, count: int) -> list[int]:
    """Tokens of a small alphabet, so that a recording of them is small."""
    return [draw.randrange(1000, 1256) for _ in range(count)]


def _cut(draw: random.Random, prefixes: list[list[int]], count: int) -> Iterator[list[int]]:
    for prefix in chain(prefixes, (draw.choice(prefixes) for _ in range(count - len(prefixes)))):
        yield [*prefix[: draw.randrange(len(prefix) // 2, len(prefix))], *ids(draw, draw.randrange(1, 100))]
