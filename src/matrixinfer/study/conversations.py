"""Conversations in text, as JSON lines of OpenAI's messages: each assistant message is the answer to a request."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np

from matrixinfer.blocks import TokenIds
from matrixinfer.study.formats import TraceError, lines, name_of
from matrixinfer.study.trace import Alphabet, Trace, Turn, filled

Message: TypeAlias = Mapping[str, Any]
Tokenize: TypeAlias = Callable[[Sequence[Message], Sequence[Any] | None], TokenIds]
"""The token ids of a chat request: its messages, and its tools. Raises `MatrixInferError`."""


class _Conversation(msgspec.Struct):
    messages: list[dict[str, Any]]
    session: str | None = None
    tools: list[Any] | None = None
    only_last: bool = False
    """Only the last answer was asked for: the other messages were there before."""


def conversations(
    path: Path,
    tokenize: Tokenize,
    *,
    block_size: int = 16,
    start_interval: float = 2.0,
    think: float = 5.0,
    seed: int = 0,
) -> Trace:
    """Read conversations. Raises `TraceError`.

    Sessions start `start_interval` seconds apart on average, in random order, and a user or tool takes `think` seconds on
    average: both are drawn with `seed`, from exponential distributions.
    """
    draw = random.Random(seed)  # noqa: S311  # a simulation
    found: list[_Conversation] = []
    decoder = msgspec.json.Decoder(_Conversation)
    for number, line in enumerate(lines(path), start=1):
        try:
            found.append(decoder.decode(line))
        except msgspec.MsgspecError as error:
            raise TraceError(f"{path}:{number}: {error}") from error
    draw.shuffle(found)
    alphabet, turns, start = Alphabet(), list[Turn](), 0.0
    for number, conversation in enumerate(found):
        start += draw.expovariate(1 / start_interval) if start_interval else 0.0
        _append(turns, conversation, f"conversation-{number}", start, think, draw, tokenize, block_size, alphabet)
    settings = {"block_size": block_size, "session_interval_s": start_interval, "think_s": think, "seed": seed}
    return Trace(name=name_of(path), block_size=block_size, turns=turns, settings=settings)


def _append(
    turns: list[Turn],
    conversation: _Conversation,
    name: str,
    start: float,
    think: float,
    draw: random.Random,
    tokenize: Tokenize,
    block_size: int,
    alphabet: Alphabet,
) -> None:
    messages = conversation.messages
    answers = [at for at, message in enumerate(messages) if at and message.get("role") == "assistant"]
    if conversation.only_last:
        answers = answers[-1:]
    prompts = [tokenize(messages[:at], conversation.tools) for at in answers]
    after: int | None = None
    for number, (at, ids) in enumerate(zip(answers, prompts, strict=True)):
        reply = _reply_tokens(messages[: at + 1], ids, tokenize, conversation.tools)
        later = prompts[number + 1] if number + 1 < len(prompts) else ids
        known = later if len(later) > len(ids) and np.array_equal(later[: len(ids)], ids) else ids
        whole = known[: (len(ids) + reply) // block_size * block_size].astype(np.uint32)
        word = alphabet.word(
            whole[first : first + block_size].tobytes() for first in range(0, len(whole) - block_size + 1, block_size)
        )
        turns.append(
            Turn(
                session=conversation.session or name,
                delay=start if after is None else draw.expovariate(1 / think) if think else 0.0,
                after=after,
                prompt=len(ids),
                reply=reply,
                letters=filled(word, len(ids), reply, block_size, alphabet),
            )
        )
        after = len(turns) - 1


def _reply_tokens(
    messages: Sequence[Message], prompt: TokenIds, tokenize: Tokenize, tools: Sequence[Any] | None
) -> int:
    """How many tokens the answer adds to its prompt."""
    return max(1, len(tokenize(messages, tools)) - len(prompt))
