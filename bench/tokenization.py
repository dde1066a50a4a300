"""Tokenizing new prompts and growing conversations, compared with the libraries underneath."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

import gigatoken
import msgspec
import tokenizers

from bench.decision import tokenizing
from bench.fleet import fleet, hold_partly
from bench.measure import Figure, Scale, ratio
from bench.prompts import MODEL, prose, tokenizer_path
from bench.turns import Turns
from matrixinfer.cli.serve import SWITCH_SECONDS
from matrixinfer.prompt.base import Chat
from matrixinfer.prompt.cache import TokenCache
from matrixinfer.prompt.encoders import Encoder, Reference, choose
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.openai import CHAT_PATH
from matrixinfer.prompt.segments import Cutter, cutter_of
from matrixinfer.routing.router import Router

T = TypeVar("T")

_TURN_CHARS = 1_500
_CACHE_BYTES = 256 * 1024 * 1024
_COLD_TARGET, _TOKENIZERS_TARGET = 1.3, 1 / 50
_WARM_TARGET_KIB, _WARM_TARGET_US = 64, 500.0
_PAUSE_TARGET_MS = 5.0


def run(scale: Scale) -> Iterator[Figure]:
    """By prompt size: a new prompt, a conversation with one more turn, the decision on it, and the pauses of the loop."""
    yield from _texts(scale)
    yield from _decisions(scale)
    yield from _pauses(scale)


def template_path() -> Path:
    """DeepSeek's chat template, from a package that has it. Raises `SystemExit` when it is not installed."""
    found = find_spec("trl")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the benchmark needs a chat template: pip install --no-deps trl")
    return Path(found.submodule_search_locations[0]) / "chat_templates" / "deepseekv3.jinja"


def _texts(scale: Scale) -> Iterator[Figure]:
    data = (tokenizer_path() / "tokenizer.json").read_bytes()
    theirs = tokenizers.Tokenizer.from_buffer(data)
    bare = gigatoken.Tokenizer.from_json(data)
    encoder = choose(lambda: gigatoken.Tokenizer.from_json(data), Reference(theirs), [], source="bench")
    cutter = cutter_of(json.loads(data), [template_path().read_text(encoding="utf-8")], shortest=encoder.piece_chars)
    local = LocalTokenizer.load(tokenizer_path(), str(template_path()))

    for kib in scale.prompt_kib:
        histories = [_history(kib, session) for session in range(scale.sessions)]
        texts = [local.render(Chat(messages=history)) for history in histories]
        warm = TokenCache(encoder.encode_each, cutter, block_size=128, max_bytes=_CACHE_BYTES)
        for text in texts:
            warm.encode(text)
        calls: list[tuple[Callable[[str], object], Callable[[], Sequence[str]]]] = [
            (partial(_cold, encoder, cutter), partial(_copies, texts)),
            (bare.encode, partial(_copies, texts)),
            (partial(_reference, theirs), partial(_copies, texts[: -(-len(texts) // 2)])),  # half: it is slow
            (warm.encode, _Growing(histories, local.render)),
        ]
        ours, fast, slow, again = _paired(calls, scale)
        case = f"{kib} KiB"
        yield Figure(case=case, name="cold", value=min(ours), unit="µs")
        yield Figure(case=case, name="gigatoken", value=min(fast), unit="µs")
        yield Figure(case=case, name="tokenizers", value=min(slow), unit="µs")
        yield Figure(case=case, name="cold / gigatoken", value=ratio(ours, fast), unit="×", target=_COLD_TARGET)
        yield Figure(case=case, name="cold / tokenizers", value=ratio(ours, slow), unit="×", target=_TOKENIZERS_TARGET)
        yield Figure(case=case, name="warm", value=min(again), unit="µs")
        yield Figure(case=case, name="warm / tokenizers", value=ratio(again, slow), unit="×")


def _copies(texts: Sequence[str]) -> list[str]:
    """Copies of the strings, as rendered prompts are new: Python caches the UTF-8 form of a string once encoded."""
    return [text[:1] + text[1:] for text in texts]


def _cold(encoder: Encoder, cutter: Cutter, text: str) -> object:
    return TokenCache(encoder.encode_each, cutter, block_size=128, max_bytes=_CACHE_BYTES).encode(text)


def _reference(tokenizer: tokenizers.Tokenizer, text: str) -> object:
    return tokenizer.encode_batch_fast([text], add_special_tokens=False)


class _Growing(Generic[T]):
    """Conversations that each call extends with a new question, a new answer and a further question.

    Returns the result of `shape` for each conversation.
    """

    def __init__(self, histories: Sequence[list[dict[str, Any]]], shape: Callable[[Chat], T]) -> None:
        self._histories = histories
        self._shape = shape
        self._turns = itertools.count()

    def __call__(self) -> list[T]:
        turn = next(self._turns)
        text = f"{turn}: {prose(turn + 1000, _TURN_CHARS)}"
        grown = [
            {"role": "user", "content": text[: _TURN_CHARS // 4]},
            {"role": "assistant", "content": text[_TURN_CHARS // 4 :]},
            {"role": "user", "content": f"And {turn}?"},
        ]
        return [self._shape(Chat(messages=[*history, *grown])) for history in self._histories]


def _decisions(scale: Scale) -> Iterator[Figure]:
    with tokenizing(str(template_path()), cache_bytes=_CACHE_BYTES) as (runner, manager):
        gateway = fleet(8, manager)
        for kib in scale.prompt_kib:
            histories = [_history(kib, session) for session in range(scale.sessions)]
            bodies = [_body(history) for history in histories]
            for session, chain in enumerate(runner.run(_routed(gateway.router, bodies))):
                hold_partly(gateway.index, gateway.pods, chain, session)
            grown = _Growing(histories, lambda chat: _body(chat.messages))
            times = []
            gc.freeze()  # as the gateway does after it has started
            for _ in range(scale.rounds + 1):
                bodies = grown()
                start = time.perf_counter()
                runner.run(_routed(gateway.router, bodies))
                times.append((time.perf_counter() - start) / len(bodies) * 1e6)
            gc.unfreeze()
            target = _WARM_TARGET_US if kib == _WARM_TARGET_KIB else None
            yield Figure(case=f"{kib} KiB", name="warm decision", value=min(times[1:]), unit="µs", target=target)


def _pauses(scale: Scale) -> Iterator[Figure]:
    """The longest turn of the event loop while it reads and tokenizes a new prompt."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)  # as the gateway does
    with tokenizing(str(template_path()), cache_bytes=_CACHE_BYTES) as (runner, manager):
        seeds = itertools.count(10_000)
        for kib in scale.pause_kib:
            gc.collect()
            gc.freeze()
            longest = []
            for _ in range(scale.rounds):
                body = _body(_history(kib, next(seeds)))
                turns = Turns()
                runner.run(_read(manager, body, turns))
                longest.append(turns.longest() * 1e3)
            gc.unfreeze()
            yield Figure(
                case=f"{kib} KiB", name="longest pause", value=min(longest), unit="ms", target=_PAUSE_TARGET_MS
            )
    sys.setswitchinterval(interval)


async def _read(manager: TokenizerManager, body: bytes, turns: Turns) -> None:
    await asyncio.sleep(0)
    with turns.watch():
        await asyncio.sleep(0)
        await manager.tokenize(await manager.read(CHAT_PATH, body), model=MODEL, engines=())
        await asyncio.sleep(0)


async def _routed(router: Router, bodies: Sequence[bytes]) -> list[Sequence[int]]:
    """Route the bodies one after the other. Returns the block hashes of each."""
    chains = []
    for body in bodies:
        async with router.dispatch(CHAT_PATH, body, request_id="bench") as request:
            chains.append(request.decision.request.chain)
    return chains


def _paired(
    calls: Sequence[tuple[Callable[[T], object], Callable[[], Sequence[T]]]], scale: Scale
) -> list[list[float]]:
    """Mean microseconds per item in each round, for each call. The items are made again before every round."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(scale.rounds + 1):  # the first round warms word caches, and is not counted
        for (call, make), out in zip(calls, times, strict=True):
            items = make()
            start = time.perf_counter()
            for item in items:
                call(item)
            out.append((time.perf_counter() - start) / len(items) * 1e6)
    return [each[1:] for each in times]


def _history(kib: int, session: int) -> list[dict[str, Any]]:
    """A conversation of `kib` KiB that ends with an answer."""
    dialogue = prose(session, kib * 1024)
    texts = [dialogue[start : start + _TURN_CHARS] for start in range(0, len(dialogue), _TURN_CHARS)]
    first = len(texts) % 2  # so that the assistant has the last one
    return [{"role": "assistant" if (i + first) % 2 else "user", "content": text} for i, text in enumerate(texts)]


def _body(messages: Sequence[dict[str, Any]]) -> bytes:
    return msgspec.json.encode({"model": MODEL, "messages": messages})
