"""Tokens in pages against one byte string."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.kvevents import tokens as module
from matrixinfer.kvevents.tokens import Tokens

PAGE = 4


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """Up to how many tokens to append, to move to pages, or to keep, as a share of those there are, in sixteenths."""
    kind = st.sampled_from(["append", "append", "page", "cut"])
    return draw(st.lists(st.tuples(kind, st.integers(0, 16), st.integers(0, 16)), max_size=30))


@given(steps())
def test_the_tokens_are_those_of_one_byte_string(drawn: list[tuple[str, int, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PAGE", PAGE)
        patch.setattr(module, "_PAGE_BYTES", 4 * PAGE)
        tokens, expected, made = Tokens(), b"", 0
        for step, share, other in drawn:
            count = len(expected) // 4
            if step == "append":
                new = b"".join(number.to_bytes(4, "big") for number in range(made, made + share))
                made += share
                expected += new
                tokens.append(new)
            elif step == "page":
                tokens.page(count * share // 16)
            else:
                kept = count * share // 16
                expected = expected[: 4 * kept]
                tokens.cut(kept, kept * other // 16)
            _same(tokens, expected)


def _same(tokens: Tokens, expected: bytes) -> None:
    count = len(expected) // 4
    assert tokens.count == count
    for first in range(count + 1):
        with tokens.since(first) as view:
            assert bytes(view) == expected[4 * first :]
        for last in range(first, count + 1):
            assert tokens.part(first, last) == expected[4 * first : 4 * last]


def test_only_the_last_tokens_keep_room_in_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAGE", 1_024)
    monkeypatch.setattr(module, "_PAGE_BYTES", 4_096)
    tokens = Tokens()
    for count in range(16, 40_001, 16):
        tokens.append(bytes(64))
        tokens.page(count)
    assert _bytes(tokens) < 160_000 + 8_000
    tokens.cut(20_010, 20_000)
    assert _bytes(tokens) < 80_000 + 5_000


def _bytes(tokens: Tokens) -> int:
    return sum(map(sys.getsizeof, tokens._pages)) + sys.getsizeof(tokens._tail)
