from hashlib import sha256
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.blocks import Scheme, SharedHashes, TokenBlockProcessor, salt_parent, token_bytes

TOP_BIT_CLEARED = 2**63 - 1
SALT = "tenant-ä"


def reference_hash(data: bytes) -> int:
    return int.from_bytes(sha256(data).digest()[:8], "big") & TOP_BIT_CLEARED


def reference(tokens: list[int], size: int, *, parent: int | None = None, chained: bool = True) -> list[int]:
    hashes: list[int] = []
    for start in range(0, len(tokens) - size + 1, size):
        data = b"".join(token.to_bytes(4, "big") for token in tokens[start : start + size])
        before = b"" if parent is None else parent.to_bytes(8, "big")
        hashes.append(reference_hash(before + data))
        parent = hashes[-1] if chained else None
    return hashes


@pytest.mark.parametrize(
    ("scheme", "salt", "tokens", "size", "expected"),
    [
        ("prefix", None, range(12), 4, [3487975429796535345, 773472199187142170, 8276616488974837647]),
        ("block", None, range(12), 4, [3487975429796535345, 6511001921514374246, 7646450706050561950]),
        ("prefix", SALT, range(12), 4, [5009907038555462448, 4886923524598051672, 8687282606321234205]),
        ("prefix", None, [0, 1, 2**31, 2**32 - 1], 4, [2286299435279899476]),
        ("prefix", None, range(256), 128, [1985043557589708906, 8128099208391010541]),
    ],
)
def test_hashes_equal_the_golden_vectors(
    scheme: Scheme, salt: str | None, tokens: range | list[int], size: int, expected: list[int]
) -> None:
    assert list(TokenBlockProcessor(size, scheme).chain(list(tokens), salt=salt)) == expected


def test_the_hash_of_a_salt_equals_its_golden_vector() -> None:
    assert salt_parent(SALT) == 2828988847840732458 == reference_hash(b"salt\0" + SALT.encode())


tokens_lists = st.lists(st.integers(0, 2**32 - 1), max_size=40)


@given(tokens_lists, st.integers(1, 9), st.none() | st.text(max_size=4), st.booleans())
def test_hashes_equal_an_independent_reference(tokens: list[int], size: int, salt: str | None, chained: bool) -> None:
    processor = TokenBlockProcessor(size, "prefix" if chained else "block")
    parent = None if salt is None else reference_hash(b"salt\0" + salt.encode())
    expected = reference(tokens, size, parent=parent, chained=chained) if chained or salt is None else []
    assert list(processor.chain(tokens, salt=salt)) == expected
    assert list(processor.chain(np.array(tokens, dtype=np.uint32), salt=salt)) == expected


@given(tokens_lists, st.integers(1, 5), st.lists(st.one_of(st.slices(8), st.integers(-9, 9)), max_size=6))
def test_a_chain_reads_as_the_list_of_its_hashes(tokens: list[int], size: int, reads: list[slice | int]) -> None:
    chain = TokenBlockProcessor(size).chain(tokens)
    expected = reference(tokens, size)
    for read in reads:
        if isinstance(read, slice) or -len(expected) <= read < len(expected):
            assert chain[read] == expected[read]
        else:
            with pytest.raises(IndexError):
                chain[read]
    assert list(chain) == expected
    assert len(chain) == len(expected)


def test_only_full_blocks_count() -> None:
    processor = TokenBlockProcessor(4)
    assert [len(processor.chain(list(range(n)))) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert processor.hashes(token_bytes(list(range(7)))) == [3487975429796535345]


def test_a_bounded_chain_holds_the_first_blocks_only() -> None:
    processor = TokenBlockProcessor(4)
    whole = list(processor.chain(list(range(40))))
    assert list(processor.chain(list(range(40)), max_blocks=3)) == whole[:3]
    assert list(processor.chain(list(range(40)), max_blocks=99)) == whole
    assert list(processor.chain(list(range(40)), max_blocks=0)) == []


def test_hashing_continues_from_a_parent_as_in_one_chain() -> None:
    processor = TokenBlockProcessor(4)
    data = token_bytes(list(range(20)))
    whole = processor.hashes(data)
    assert processor.hashes(memoryview(data)[32:], whole[1]) == whole[2:]


def test_equal_blocks_with_different_prefixes_differ_unless_hashed_separately() -> None:
    first, second = TokenBlockProcessor(4).chain([7, 7, 7, 7] * 2)
    assert first != second
    first, second = TokenBlockProcessor(4, "block").chain([7, 7, 7, 7] * 2)
    assert first == second


def test_salts_keep_prompts_apart() -> None:
    processor = TokenBlockProcessor(4)
    chains = [set(processor.chain(list(range(12)), salt=salt)) for salt in (None, "", "a", "b")]
    assert len(set().union(*chains)) == 12


def test_array_views_hash_as_their_values() -> None:
    tokens = np.arange(24, dtype=np.uint32)[::2]
    assert list(TokenBlockProcessor(4).chain(tokens)) == reference(list(range(0, 24, 2)), 4)


@pytest.mark.parametrize("size", [0, -1])
def test_a_block_holds_at_least_one_token(size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        TokenBlockProcessor(size)


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="scheme"):
        TokenBlockProcessor(4, cast("Scheme", "rolling"))


@pytest.mark.parametrize("token", [-1, 2**32, 2**70])
def test_ids_beyond_32_bits_are_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        TokenBlockProcessor(1).chain([token])


@pytest.mark.parametrize("tokens", [[1.5], ["1"], [None], np.array([1, -1]), np.array([0.5])])
def test_ids_that_are_not_unsigned_integers_are_refused(tokens: Any) -> None:
    with pytest.raises(TypeError):
        TokenBlockProcessor(1).chain(tokens)


@given(
    st.lists(st.integers(0, 2**32 - 1), max_size=40),
    st.integers(1, 5),
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(0, 12),
)
def test_known_hashes_are_used_and_extended_up_to_a_limit(
    tokens: list[int], size: int, known: int, more: int, max_blocks: int
) -> None:
    blocks = TokenBlockProcessor(size)
    expected = list(blocks.chain(tokens))
    hashes = SharedHashes(expected[:known], limit=len(expected[:known]) + more)
    chain = blocks.chain(tokens, max_blocks=max_blocks, hashes=hashes)
    assert chain == expected[:max_blocks]
    assert hashes == expected[: max(len(expected[:known]), min(len(chain), hashes.limit))]
