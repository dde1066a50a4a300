"""A chat that continues one that was read before is read like any other, but only its new messages are decoded."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from matrixinfer.config import ModelConfig, TokenizationConfig
from matrixinfer.errors import InvalidRequest
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.bounds import DEFAULT_BOUNDS, LARGE_BYTES, Bounds
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.openai import CHAT_PATH
from matrixinfer.prompt.read_chats import LEAST_BYTES, PLAIN_BYTES, ReadChats
from matrixinfer.prompt.requests import parse
from matrixinfer.prompt.stand_in import Span

from .support import folder, read_in_threads, tokenizer
from .template_cases import TOOLS
from .test_resuming import message

LONG = "A long text, so that its chat is worth remembering. " * 660
"""Longer than `PLAIN_BYTES`."""


def said(*contents: str) -> list[dict[str, Any]]:
    return [{"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(contents)]


def encoded(messages: list[dict[str, Any]], **options: Any) -> bytes:
    return json.dumps({"model": "m", "messages": messages, **options}).encode()


def known(prompt: Prompt) -> Any:
    """All that a prompt says, to be compared."""
    whole = msgspec.structs.asdict(prompt) | {"prefix": bytes(prompt.prefix)}
    if prompt.chat is not None:
        chat = msgspec.structs.asdict(prompt.chat)
        sent = msgspec.structs.asdict(chat["sent"])
        sent["input_ids"] = None if sent["input_ids"] is None else sent["input_ids"].tolist()
        whole["chat"] = chat | {"sent": sent, "rendered": None}
    # As JSON, in which the order of keys counts, and 1 is not 1.0.
    return msgspec.json.encode(whole)


def outcome(body: bytes, chats: ReadChats | None, bounds: Bounds = DEFAULT_BOUNDS) -> Any:
    try:
        return known(parse(CHAT_PATH, body, bounds, chats=chats))
    except InvalidRequest as error:
        return str(error), error.param


def expected(body: bytes, bounds: Bounds = DEFAULT_BOUNDS) -> Any:
    """What a reader makes of a body that knows no other chats, and decodes the whole body before the messages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Span, "guessed", lambda _: None)
        return outcome(body, None, bounds)


def shared(one: Prompt, other: Prompt) -> int:
    """How many messages two chats share as objects."""
    assert one.chat is not None
    assert other.chat is not None
    return sum(a is b for a, b in zip(one.chat.messages, other.chat.messages, strict=False))


def texts(chance: random.Random, value: Any) -> str:
    """JSON of a value as different clients write it."""
    separators = chance.choice(((",", ":"), (", ", ": "), (" ,\n", "\t: ")))
    return json.dumps(value, ensure_ascii=chance.random() < 0.5, separators=separators)


def changed(chance: random.Random, messages: list[str], options: dict[str, Any]) -> list[str]:
    """The messages after one more turn, in JSON. Most go on, others change what was there."""
    match chance.randrange(14):
        case 0:
            options["user"] = chance.choice(('messages": [', None))
        case 1:
            options["tools"] = chance.choice((TOOLS, TOOLS[:1], None, [], [1]))
        case 2:
            options["cache_salt"] = chance.choice(("a", "b", None))
        case 3:
            at = chance.randrange(len(messages))
            return [*messages[:at], texts(chance, message(chance, "user")), *messages[at + 1 :]]
        case 4:
            return messages[: chance.randrange(1, len(messages) + 1)]
        case 5:
            options |= {"temperature": chance.choice((1, 1.0)), "add_generation_prompt": chance.choice((True, None, 1))}
    roles = [chance.choice(("user", "assistant", "tool")) for _ in range(chance.randrange(4))]
    return [*messages, *(texts(chance, message(chance, role)) for role in roles)]


ODD = ("{}", "1", '"x"', "[]", "null", '{"role":"user","role":"tool"}', "{,}", "", '"the messages before these"')
ODD_FIELDS = ('"messages":[{"role":"user"}]', '"\\u006dessages":[]', '"messages":["the messages before these"]')


def bodies(seed: int) -> Iterator[bytes]:
    """Bodies of one conversation, some of which are not quite valid."""
    chance = random.Random(seed)
    messages = [texts(chance, {"role": "system", "content": LONG}), texts(chance, message(chance, "user"))]
    options: dict[str, Any] = {"stream": True, "stop": ["]", '"messages":'], "metadata": {"messages": [1]}}
    first, comma = chance.choice(("metadata", "stop", "tools")), chance.choice((",", ", ", "\n,"))
    listed = chance.choice(("[{}]", "[ {} ]", "[{}\n]"))
    for _ in range(14):
        messages = changed(chance, messages, options)
        sent = [*messages, chance.choice(ODD)] if chance.random() < 0.1 else messages
        others = [f"{json.dumps(key)}:{json.dumps(value)}" for key, value in options.items() if key != first]
        if chance.random() < 0.1:
            others.append(chance.choice(ODD_FIELDS))
        whole = listed if chance.random() < 0.9 else chance.choice(("[{},]", "[{}", "{}]", "[[{}]]"))
        head = f'"model":"m",{json.dumps(first)}:{json.dumps(options.get(first))}'
        yield f'{{{head},"messages":{whole.format(comma.join(sent))},{",".join(others)}}}'.encode()


@pytest.mark.parametrize("seed", range(40))
def test_any_sequence_of_bodies_is_read_as_by_a_new_reader(seed: int) -> None:
    chats = ReadChats(1 << 24)
    for part in range(5):
        for body in bodies(seed * 100 + part):
            assert outcome(body, chats) == expected(body)
            assert outcome(body, None) == expected(body)


def test_the_random_bodies_continue_one_another() -> None:
    chats, found = ReadChats(1 << 24), 0
    for seed in range(20):
        for body in bodies(seed):
            found += chats.find(body) is not None
            outcome(body, chats)
    assert found > 50


def test_only_new_messages_are_decoded() -> None:
    chats = ReadChats(1 << 24)
    messages = said(LONG, "one")
    first = parse(CHAT_PATH, encoded(messages), chats=chats)
    second = parse(CHAT_PATH, encoded([*messages, *said("two", "three")]), chats=chats)
    third = parse(CHAT_PATH, encoded([*messages, *said("two", "three"), *said("four")], stream=True), chats=chats)
    assert (shared(first, second), shared(second, third)) == (2, 4)
    assert third.chat is not None
    assert [each["content"] for each in third.chat.messages] == [LONG, "one", "two", "three", "four"]


def test_a_turn_can_be_taken_again() -> None:
    chats = ReadChats(1 << 24)
    messages = said(LONG, "one")
    first = parse(CHAT_PATH, encoded(messages), chats=chats)
    for again in range(20):
        assert shared(first, parse(CHAT_PATH, encoded(messages), chats=chats)) == 2
        assert shared(first, parse(CHAT_PATH, encoded([*messages, *said(str(again), "x")]), chats=chats)) == 2


def test_tools_that_are_the_same_are_not_decoded_again() -> None:
    chats = ReadChats(1 << 24)
    messages = said(LONG, "one")
    first = parse(CHAT_PATH, encoded(messages, tools=TOOLS), chats=chats)
    second = parse(CHAT_PATH, encoded([*messages, *said("two")], tools=TOOLS), chats=chats)
    third = parse(CHAT_PATH, encoded([*messages, *said("two", "three")], tools=TOOLS[:1]), chats=chats)
    assert first.chat is not None
    assert second.chat is not None
    assert third.chat is not None
    assert second.chat.tools is first.chat.tools
    assert third.chat.tools == TOOLS[:1]


def test_chats_with_different_salts_share_nothing() -> None:
    chats = ReadChats(1 << 24)
    messages = said(LONG, "one")
    first = parse(CHAT_PATH, encoded(messages, cache_salt="a"), chats=chats)
    for salt, count in (("a", 2), ("b", 0), (None, 0), ("a", 2)):
        other = parse(CHAT_PATH, encoded([*messages, *said("two")], cache_salt=salt), chats=chats)
        assert shared(first, other) == count


def test_memory_is_bounded_and_the_least_recently_used_go_first() -> None:
    chats = ReadChats(800_000)
    first = parse(CHAT_PATH, encoded(said("first" + LONG)), chats=chats)
    for i in range(50):
        parse(CHAT_PATH, encoded(said(f"{i}{LONG}")), chats=chats)
        assert shared(first, parse(CHAT_PATH, encoded(said("first" + LONG)), chats=chats)) == 1
    assert chats.memory <= 800_000
    assert 2 < len(chats) < 20
    assert chats.find(encoded(said("0" + LONG))) is None
    assert chats.find(encoded(said("49" + LONG))) is not None


def test_chats_that_differ_only_at_their_end_are_told_apart() -> None:
    chats = ReadChats(1 << 24)
    # Lengths are rounded down to a multiple of 1024 here, which is before what differs.
    alike = LONG + "x" * ((800 - len(encoded(said(LONG, "00")))) % 1024)
    for i in range(10, 90):
        parse(CHAT_PATH, encoded(said(alike, str(i))), chats=chats)
    assert len(chats) == 64
    for i in range(10, 90):
        found = chats.find(encoded(said(alike, str(i), "more")))
        assert (found is not None) == (i >= 26)
        assert found is None or found.messages == said(alike, str(i))


def test_nothing_is_kept_where_nothing_may_be() -> None:
    chats = ReadChats(0)
    parse(CHAT_PATH, encoded(said(LONG)), chats=chats)
    assert (len(chats), chats.memory, chats.find(encoded(said(LONG)))) == (0, 0, None)
    chats = ReadChats(1 << 24)
    parse(CHAT_PATH, encoded(said("x" * (PLAIN_BYTES - 100))), chats=chats)
    parse(CHAT_PATH, encoded(said("x"), tools=TOOLS), chats=chats)
    assert len(chats) == 0
    parse(CHAT_PATH, encoded(said("x" * LEAST_BYTES), tools=TOOLS), chats=chats)
    assert len(chats) == 1


@pytest.mark.parametrize(
    "more",
    [
        b',"messages":[{"role":"user","content":"other"}]}',
        b',"\\u006dessages":[{"role":"user","content":"other"}]}',
        b',"messages":["the messages before these",{"role":"user"}]}',
        b',"messages":[{"role":"user","name":"12"},{"role":"user"}]}',  # the first is as long as what stands in for messages
        b',"messages":[]}',
        b',"messages":null}',
        b',"x":"the messages before these"}',
        b'}"the messages before these"',
        b"",
        b"}}",
        b',"tools":[1]}',
        b',"model":"\xff"}',
        b',"user":"\xff"}',
    ],
)
def test_what_follows_the_messages_is_read_as_ever(more: bytes) -> None:
    chats = ReadChats(1 << 24)
    body = encoded(said(LONG))
    parse(CHAT_PATH, body, chats=chats)
    continued = body[:-2] + b',{"role":"user","content":"x"}]' + more
    assert chats.find(continued) is not None
    assert outcome(continued, chats) == expected(continued)


def test_lists_that_look_like_messages_are_told_from_them() -> None:
    chats = ReadChats(1 << 24)
    listed = json.dumps(said(LONG))
    body = b'{"metadata":{"messages":%b},"messages":%b,"model":"m"}' % (listed.encode(), listed.encode())
    parse(CHAT_PATH, body, chats=chats)
    twice = b'{"messages":%b,"messages":%b,"model":"m"}' % (listed.encode(), listed.encode())
    parse(CHAT_PATH, twice, chats=chats)
    for each in (body, twice):
        for more in (b',{"role":"user"}', b""):
            for at in (each.find(b"}]") + 1, each.rfind(b"}]") + 1):
                changed = each[:at] + more + each[at:]
                assert outcome(changed, chats) == expected(changed)


def long_chat(kib: int, *more: str) -> bytes:
    return encoded(said(*(LONG[:1024] for _ in range(kib)), *more))


def test_large_chats_are_read_within_the_same_bounds() -> None:
    chats = ReadChats(1 << 24)
    kib = 0
    for kib in range(240, 300, 4):
        body = long_chat(kib)
        assert outcome(body, chats) == expected(body)
    for more in ('"input": [1, 2, 3]', "x", "[" * 300_000, ",[" * 100_000, '"prompt":[1]', "x" * LARGE_BYTES):
        for bounds in (
            DEFAULT_BOUNDS,
            Bounds(max_bytes=400_000, max_items=10),
            Bounds(max_bytes=300_000, max_items=10),
        ):
            for raw in (json.dumps(more), f'"","x":{{{more}:0}}' if more[0] == '"' else f'"","x":"{more[:9]}"'):
                body = long_chat(kib)[:-2] + b',{"role":"user","content":%b}]}' % raw.encode()
                assert outcome(body, chats, bounds) == expected(body, bounds)


def claimed(body: bytes, chats: ReadChats | None) -> list[int]:
    costs: list[int] = []

    def claim(cost: int) -> bool:
        costs.append(cost)
        return True

    parse(CHAT_PATH, body, claim=claim, chats=chats)
    return costs


def test_a_claim_is_the_same_with_what_was_read_before() -> None:
    chats = ReadChats(1 << 24)
    for kib in (250, 270, 290, 295):
        costs = [claimed(long_chat(kib), known_chats) for known_chats in (chats, None)]
        assert costs[0] == costs[1]
        assert bool(costs[0]) == (len(long_chat(kib)) > LARGE_BYTES)


def test_threads_can_read_chats_at_the_same_time() -> None:
    chats = ReadChats(1_200_000)
    failures: list[object] = []

    def read(start: int) -> None:
        for seed in range(start, start + 3):
            failures.extend(body for body in bodies(seed % 4) if outcome(body, chats) != outcome(body, None))

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert chats.memory <= 1_200_000


@pytest.mark.parametrize("template", ["chatml", None])
async def test_conversations_have_the_same_ids_as_with_a_new_gateway(tmp_path: Path, template: str | None) -> None:
    path = folder(
        tmp_path, tokenizer(), chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    models = (ModelConfig(name="m", tokenizer=str(path), chat_template=template),)
    fresh = LocalTokenizer.load(path, template)
    async with TokenizerManager(models, TokenizationConfig(cache_bytes=1 << 22), None) as manager:
        for seed in range(12):
            for body in bodies(seed):
                try:
                    prompt = await manager.read(CHAT_PATH, body)
                except InvalidRequest:
                    continue
                if prompt.chat is None:
                    continue
                try:
                    ids = (await manager.tokenize(prompt, model="m", engines=())).tokens.ids
                except Exception as error:  # noqa: BLE001 - the other one must fail in the same way
                    with pytest.raises(type(error)):
                        fresh.tokenize(parse(CHAT_PATH, body))
                else:
                    assert np.array_equal(ids, fresh.tokenize(parse(CHAT_PATH, body)).ids)


async def test_a_large_chat_that_goes_on_needs_no_thread() -> None:
    async with TokenizerManager((), TokenizationConfig(), None) as manager:
        bodies = [long_chat(300), long_chat(301), long_chat(302), long_chat(302, "x" * LARGE_BYTES)]
        with read_in_threads(manager) as used:
            prompts = [await manager.read(CHAT_PATH, body) for body in bodies]
        assert used == [bodies[0], bodies[3]]
        assert shared(prompts[1], prompts[2]) == 301
        assert all(prompt.claim is not None for prompt in prompts)
