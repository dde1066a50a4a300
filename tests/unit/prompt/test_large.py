"""Large bodies: what is not decoded, and what is then still known."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from matrixinfer.errors import InvalidRequest
from matrixinfer.prompt import anthropic, fields, large, openai, pooling, responses
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.bounds import DEFAULT_BOUNDS, LARGE_BYTES, Bounds
from matrixinfer.prompt.memory import Memory
from matrixinfer.prompt.requests import READERS, parse

CHAT, TEXT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"
MEGABYTE = 1024 * 1024
DATA = "data:image/png;base64," + "A" * (6 * MEGABYTE)
NARROW = Bounds(max_bytes=64 * 1024, max_items=10)


def read(path: str, bounds: Bounds = DEFAULT_BOUNDS, /, **body: Any) -> Prompt:
    return parse(path, json.dumps({"model": "m", **body}).encode(), bounds)


def image(data: str) -> dict[str, Any]:
    return {"type": "image_url", "uuid": "u", "image_url": {"url": data}}


WITH_IMAGE: dict[str, Callable[[str], dict[str, Any]]] = {
    CHAT: lambda data: {"messages": [{"role": "user", "content": ["a", image(data), {"type": "text", "text": "b"}]}]},
    RESPONSES: lambda data: {
        "input": [
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": data}],
            }
        ]
    },
    MESSAGES: lambda data: {
        "system": "s",
        "messages": [
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "t",
                        "content": [{"type": "image", "source": {"data": data}}],
                    },
                    {"type": "image", "source": {"type": "base64", "data": data}},
                    {"type": "text", "text": "b"},
                ],
            }
        ],
    },
    "/v1/embeddings": lambda data: {"messages": [{"role": "user", "content": [image(data)]}]},
}


@pytest.mark.parametrize("path", WITH_IMAGE)
def test_a_large_image_changes_nothing_but_itself(path: str) -> None:
    def without_values(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: "medium" if k in ("image_url", "source") else without_values(v) for k, v in value.items()}
        return [without_values(each) for each in value] if isinstance(value, list) else value

    small, large_ = read(path, **WITH_IMAGE[path]("data:image/png;base64,AAAA")), read(path, **WITH_IMAGE[path](DATA))
    assert small.chat is not None
    assert large_.chat is not None
    assert without_values(large_.chat.messages) == without_values(small.chat.messages)
    assert large_.request_class == small.request_class
    assert large_.size < 1000
    assert DATA.encode() in bytes(large_.prefix)
    assert large_.prefix_bytes == len(large_.prefix) > len(DATA)


def test_the_value_of_a_large_image_is_not_copied() -> None:
    body = json.dumps({"model": "m", **WITH_IMAGE[CHAT]("data:image/png;base64," + "A" * (40 * MEGABYTE))}).encode()
    tracemalloc.start()
    prompt = parse(CHAT, body).without_content()
    peak, now = tracemalloc.get_traced_memory()[1], tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert peak < MEGABYTE
    assert now < MEGABYTE
    assert prompt.prefix_bytes > 40 * MEGABYTE


@pytest.mark.parametrize("key", ["text", "tool_calls"])
def test_long_values_that_are_no_media_are_kept(key: str) -> None:
    long = "x" * (2 * MEGABYTE)
    values = {
        "text": {"content": [{"type": "text", "text": "t", "source": long}, image(DATA)]},
        "tool_calls": {
            "content": [image(DATA)],
            "tool_calls": [{"function": {"name": "f", "arguments": {"data": long}}}],
        },
    }
    prompt = read(CHAT, messages=[{"role": "assistant", **values[key]}])
    assert prompt.chat is not None
    assert long in json.dumps(prompt.chat.messages)
    assert DATA not in json.dumps(prompt.chat.messages)


def test_long_token_ids_are_read_into_an_array() -> None:
    ids = np.random.default_rng(1).integers(0, 150_000, 1_500_000).tolist()
    prompt = read(TEXT, prompt=ids, truncate_prompt_tokens=5, cache_salt="s", stream=True)
    assert prompt.token_ids is not None
    assert prompt.token_ids.dtype == np.uint32
    assert prompt.token_ids.tolist() == ids
    assert (prompt.keep_last, prompt.cache_salt, prompt.stream, prompt.counted) == (5, "s", True, False)
    assert read("/v1/embeddings", input=ids).token_ids is not None


@pytest.mark.parametrize("count", [140_000, 2_000_000])
@pytest.mark.parametrize("number", [1, 150_000])
def test_token_ids_claim_what_they_take(count: int, number: int) -> None:
    body = json.dumps({"model": "m", "prompt": [number] * count}, separators=(",", ":")).encode()
    claimed: list[int] = []

    def claim(more: int) -> bool:
        claimed.append(more)
        return True

    tracemalloc.start()
    prompt = parse(TEXT, body, claim=claim)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert prompt.token_ids is not None
    assert prompt.token_ids.nbytes == 4 * count
    assert 4 * count <= sum(claimed) < 4 * count + 10_000
    assert peak < sum(claimed) + MEGABYTE  # the piece that is being read
    assert parse(TEXT, body, claim=lambda _: False).inexact is not None


@pytest.mark.parametrize("between", ["", " ", "\n" * 10, " " * 200_000])
def test_token_ids_may_have_white_space_anywhere(between: str) -> None:
    ids = list(range(50_000, 90_000))
    comma = f"{between[:10]},{between[:10]}"
    listed = f"[{between}{comma.join(map(str, ids))},{between}7{between}]"
    prompt = parse(TEXT, b'{"model": "m", "prompt": %s}' % listed.encode())
    assert prompt.token_ids is not None
    assert prompt.token_ids.tolist() == [*ids, 7]


@pytest.mark.parametrize("last", ['"x"', "-1", "4294967296", "[1]", "1.5"])
def test_token_ids_among_which_is_something_else_stay_unread(last: str) -> None:
    body = b'{"model": "m", "prompt": [%s%s]}' % (b"1, " * 2_000_000, last.encode())
    assert parse(TEXT, body).inexact is not None


MANY = {
    "empty messages": (CHAT, b'{"model": "m", "messages": [%s{}]}' % (b"{}," * 1_300_000)),
    "messages": (CHAT, b'{"model": "m", "messages": [%s{}]}' % (b'{"role":"user","content":"x"},' * 1_000_000)),
    "tools": (
        CHAT,
        b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": [%s{}]}' % (b"{}," * 10**6),
    ),
    "values of a variable": (
        CHAT,
        b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"a": [%s1]}}'
        % (b"[]," * 10**6),
    ),
    "ignored values": (
        CHAT,
        b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "x": [%s1]}' % (b"[]," * 20_000_000),
    ),
    "prompts": (TEXT, b'{"model": "m", "prompt": [%s"x"]}' % (b'"x",' * 2_000_000)),
    "lists of ids": (TEXT, b'{"model": "m", "prompt": [%s[1]]}' % (b"[1]," * 2_000_000)),
    "too many ids": (TEXT, b'{"model": "m", "prompt": [%s1]}' % (b"1," * 30_000_000)),
    "text": (TEXT, b'{"model": "m", "prompt": "%s"}' % (b"a" * 60_000_000)),
    "queries": ("/score", b'{"model": "m", "queries": [%s"x"], "documents": ["d"]}' % (b'"x",' * 2_000_000)),
    "blocks": (MESSAGES, b'{"model": "m", "messages": [], "system": [%s{}]}' % (b'{"type":"text"},' * 1_000_000)),
    "token ids of another engine": (
        CHAT,
        b'{"model": "m", "messages": [{"role":"user","content":"x"}], "kv_transfer_params": {"prompt_token_ids": [%s1]}}'
        % (b"1," * 20_000_000),
    ),
    "parts": (
        CHAT,
        b'{"model": "m", "messages": [{"role": "user", "content": [%s{}]}]}' % (b'{"type":"text"},' * 500_000),
    ),
}


@pytest.mark.parametrize("name", MANY)
def test_what_would_take_too_much_is_not_decoded(name: str) -> None:
    path, body = MANY[name]
    tracemalloc.start()
    prompt = parse(path, body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert prompt.inexact is not None
    assert (
        "larger than" in prompt.inexact or "so many values" in prompt.inexact or "token ids are more" in prompt.inexact
    )
    assert prompt.model == "m"
    assert peak < 1.1 * len(body) + 16 * MEGABYTE
    assert prompt.chat is None


def test_what_is_left_unread_still_has_its_bytes_and_its_other_fields() -> None:
    prompt = read(CHAT, NARROW, messages=[{"role": "user", "content": "x" * 300_000}], stream=True, cache_salt="s")
    assert prompt.inexact == "the request is larger than 65536 bytes"
    assert bytes(prompt.prefix).startswith(b'[{"role": "user", "content": "xxx')
    assert (prompt.stream, prompt.cache_salt, prompt.counted) == (True, "s", True)
    assert (
        read("/v1/messages/count_tokens", NARROW, messages=[{"role": "user", "content": "x" * 300_000}]).prefix == b""
    )


def test_invalid_large_bodies_are_refused_as_small_ones_are() -> None:
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        parse(CHAT, b'{"model": "m", "messages": [%s{}}' % (b"{}," * 2_000_000))
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        parse(CHAT, b'{"model": "m", "messages": %s' % (b"[" * 20_000_000))


def test_a_prompt_holds_the_memory_of_what_is_decoded_as_long_as_it_has_it() -> None:
    memory = Memory(64 * MEGABYTE)
    body = json.dumps({"model": "m", "prompt": "x" * 300_000}).encode()
    claim = memory.hold()
    prompt = msgspec.structs.replace(parse(TEXT, body, DEFAULT_BOUNDS, claim.take), claim=claim)
    del claim
    assert memory.used >= 8 * len(body)
    prompt = prompt.without_content()
    assert memory.used == 0
    assert (prompt.text, prompt.prefix, prompt.prefix_bytes) == (None, b"", 300_000)


def test_without_memory_a_prompt_stays_unread() -> None:
    body = json.dumps({"model": "m", "prompt": "x" * 300_000}).encode()
    prompt = parse(TEXT, body, DEFAULT_BOUNDS, Memory(MEGABYTE // 2).hold().take)
    assert prompt.inexact == "other large requests take the memory that it would need"


def test_bodies_that_are_not_large_are_read_without_asking_for_memory() -> None:
    body = json.dumps({"model": "m", "prompt": "x" * (LARGE_BYTES - 100)}).encode()
    assert parse(TEXT, body, DEFAULT_BOUNDS, lambda _: False).text is not None


def test_every_field_of_every_reader_is_known_to_the_reader_of_large_bodies() -> None:
    modules = (anthropic, fields, openai, pooling, responses)
    kinds = [each for module in modules for each in vars(module).values() if isinstance(each, type)]
    named = {name for each in kinds if issubclass(each, fields.Request) for name in each.__struct_fields__}
    assert named == set(vars(large)["_Skimmed"].__struct_fields__)
    assert len(READERS) == 11
