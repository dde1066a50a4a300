"""A medium is the same content in a small and in a large request."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from matrixinfer.prompt.bounds import Bounds
from matrixinfer.prompt.large import read_large
from matrixinfer.prompt.openai import CHAT_PATH
from matrixinfer.prompt.outline import contents_of
from matrixinfer.prompt.requests import parse

DATA = "data:image/png;base64," + "QUJD" * 1000


def body(part: Mapping[str, object]) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": [part]}]}).encode()


def contents(part: Mapping[str, object], *, large: bool) -> tuple[bytes, ...] | None:
    sent = body(part)
    bounds = Bounds(max_items=10_000, max_bytes=1 << 20)
    prompt = read_large(parse, CHAT_PATH, sent, bounds, lambda _: True) if large else parse(CHAT_PATH, sent)
    assert prompt.chat is not None
    return contents_of(prompt.chat)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": DATA}},
        {"type": "image_url", "image_url": {"url": DATA, "detail": "low"}, "uuid": "a"},
        {"type": "image_url", "image_url": DATA},
        {"type": "input_audio", "input_audio": {"data": "QUJD" * 1000, "format": "wav"}},
    ],
)
def test_data_is_known_by_its_digest(part: Mapping[str, object]) -> None:
    assert contents(part, large=True) == contents(part, large=False) is not None


def test_other_data_is_other_content() -> None:
    other = {"type": "image_url", "image_url": {"url": DATA + "QUJE"}}
    assert contents(other, large=True) != contents({"type": "image_url", "image_url": {"url": DATA}}, large=True)


def test_a_long_url_says_nothing_of_the_bytes_behind_it() -> None:
    assert contents({"type": "image_url", "image_url": {"url": "https://x/" + "y" * 4000}}, large=True) is None
