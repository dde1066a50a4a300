"""Letters are hashed as blocks of tokens are, whatever is known of them already."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.study.trace import LetterBlocks, Turn

words = st.lists(st.integers(0, 3), max_size=12)


def hashed(letters: Sequence[int]) -> list[int]:
    """The hashes of letters, each a block of one token, without what was hashed before."""
    data = array("I", letters)
    data.byteswap()
    return TokenBlockProcessor(1).hashes(data.tobytes())


@given(st.lists(st.tuples(words, st.one_of(st.none(), st.integers(0, 20))), max_size=12))
def test_turns_are_hashed_as_tokens_are(turns: list[tuple[list[int], int | None]]) -> None:
    blocks = LetterBlocks()
    for number, (letters, after) in enumerate(turns):
        before = None if after is None or after >= number else after
        turn = Turn(session="s", delay=0, after=before, prompt=1, reply=1, letters=array("I", letters))
        assert blocks.of_turn(number, turn) == hashed(letters)
        assert blocks.of_turn(number, turn) == hashed(letters)


@given(words, words)
def test_letters_behind_others_are_hashed_as_tokens_are(first: list[int], then: list[int]) -> None:
    blocks = LetterBlocks()
    begun = blocks.of(first)
    assert begun + blocks.of(then, begun[-1] if begun else None) == hashed([*first, *then])
