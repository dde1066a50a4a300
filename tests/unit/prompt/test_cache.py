from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from matrixinfer.blocks import TokenBlockProcessor, TokenIds
from matrixinfer.prompt.bounds import TooMuch
from matrixinfer.prompt.cache import MAX_PIECE_CHARS, Lru, TokenCache
from matrixinfer.prompt.segments import Cutter
from tests.unit.prompt.support import tokenizer

TURNS = (
    "<|im_start|>user\n",
    "<|im_start|>assistant\n",
    "<|im_end|>\n",
    "Hello there, ",
    "12345\n",
    "What?\n",
    "ü 中 😀",
)
BEFORE = np.array([0], dtype=np.uint32)
AFTER = np.array([1], dtype=np.uint32)


class Reference:
    """Encodes whole texts and counts the characters."""

    def __init__(self, made: Tokenizer) -> None:
        self._made = made
        self.chars = 0

    def __call__(self, text: str) -> TokenIds:
        self.chars += len(text)
        return np.array(self._made.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def each(self, texts: Sequence[str]) -> list[TokenIds]:
        return [self(text) for text in texts]


@pytest.fixture(scope="module")
def made() -> Tokenizer:
    return tokenizer()


def cache(encode: Reference, *, max_bytes: int = 1_000_000, block_size: int = 4) -> TokenCache:
    return TokenCache(
        encode.each, Cutter(("<|im_start|>", "<|im_end|>"), shortest=1), block_size=block_size, max_bytes=max_bytes
    )


edits = st.lists(
    st.tuples(st.floats(0, 1), st.floats(0, 1), st.lists(st.sampled_from(TURNS), max_size=4).map("".join)), max_size=12
)


def edited(text: str, change: tuple[float, float, str]) -> str:
    """`text` with a part replaced, most often at its end."""
    at, until, new = change
    start = len(text) if at > 0.5 else round(2 * at * len(text))
    return text[:start] + new + text[start + round(until * 20) :]


@settings(deadline=None)
@given(start=st.lists(st.sampled_from(TURNS), max_size=12).map("".join), changes=edits, around=st.booleans())
@pytest.mark.parametrize("max_bytes", [0, 3_000, 1_000_000])
def test_cached_ids_and_hashes_equal_those_of_a_fresh_text(
    made: Tokenizer, max_bytes: int, start: str, changes: Sequence[tuple[float, float, str]], around: bool
) -> None:
    reference, blocks = Reference(made), TokenBlockProcessor(4)
    tested = cache(reference, max_bytes=max_bytes)
    before, after = (BEFORE, AFTER) if around else (BEFORE[:0], AFTER[:0])
    text = start
    for change in [(1.0, 0.0, ""), *changes]:
        text = edited(text, change)
        ids, hashes = tested.encode(text, before=before, after=after)
        expected = np.concatenate([before, reference(text), after])
        assert ids.dtype == np.uint32
        assert ids.tolist() == expected.tolist()
        whole = blocks.chain(expected)
        assert hashes == whole[: len(hashes)]
        assert blocks.chain(ids, max_blocks=len(whole) // 2, hashes=hashes) == whole[: len(whole) // 2]
        assert hashes == whole[: len(hashes)]
        assert blocks.chain(ids, hashes=hashes) == whole
        assert hashes == whole[: len(hashes)]


def test_a_conversation_that_has_grown_costs_the_new_turn(made: Tokenizer) -> None:
    reference, blocks = Reference(made), TokenBlockProcessor(4)
    tested = cache(reference)
    history = "".join(f"<|im_start|>user\nQuestion {i}<|im_end|>\n" for i in range(50))
    ids, hashes = tested.encode(history)
    blocks.chain(ids, hashes=hashes)
    asked = reference.chars
    new = "<|im_start|>user\nOne more<|im_end|>"
    ids, hashes = tested.encode(history + new)
    assert reference.chars - asked == len("<|im_start|>user\nOne more") + len("<|im_end|>")
    assert len(hashes) == len(reference(history)) // 4
    assert hashes == list(blocks.chain(ids))[: len(hashes)]


def test_a_prompt_with_few_hashes_does_not_shorten_those_of_others(made: Tokenizer) -> None:
    reference, blocks = Reference(made), TokenBlockProcessor(4)
    tested = cache(reference)
    system = "<|im_start|>system\nBe kind to everyone.<|im_end|>"
    first, other = system + "<|im_start|>user\nFirst of two" * 4, system + "<|im_start|>user\nOther of two" * 4
    ids, hashes = tested.encode(first)
    blocks.chain(ids, hashes=hashes)
    tested.encode(other)  # only the blocks that both texts begin with are hashed
    _, again = tested.encode(first)
    assert again == list(blocks.chain(reference(first[: first.rindex("<|im_start|>")])))


def test_a_text_is_not_cut_inside_a_token_where_a_shorter_text_ended(made: Tokenizer) -> None:
    reference = Reference(made)
    tested = cache(reference)
    for text in ("Hello there, <|im_end|>", "Hello there, what?<|im_end|>", "Hello there, "):
        assert tested.encode(text)[0].tolist() == reference(text).tolist()


def test_memory_is_bounded_and_counted(made: Tokenizer) -> None:
    tested = cache(Reference(made), max_bytes=20_000)
    for i in range(300):
        tested.encode(f"<|im_start|>user {i}<|im_end|>" * 3)
        assert tested.stats.bytes <= 20_000
    stats = tested.stats
    assert stats.evicted > 0
    assert 0 < stats.entries < 100
    assert stats.hit_chars + stats.miss_chars == sum(3 * len(f"<|im_start|>user {i}<|im_end|>") for i in range(300))
    assert stats.hit_chars > stats.miss_chars  # each text came three times, and the end mark always


def test_only_hashes_that_count_towards_the_memory_bound_are_kept(made: Tokenizer) -> None:
    reference, blocks = Reference(made), TokenBlockProcessor(4)
    tested = cache(reference, max_bytes=40_000)
    for i in range(40):  # long last pieces are not cached, and neither are their hashes
        for length in (1, 3, 6):
            text = f"<|im_start|>user {i}" + "<|im_end|>what was that" * length + "<|im_start|>" + f"tail {i} " * 200
            ids, hashes = tested.encode(text)
            blocks.chain(ids, hashes=hashes)
    kept = {id(each.hashes): len(each.hashes) for each, _ in tested._beginnings._entries.values()}
    owned = sum(len(each.ids) for each, _ in tested._beginnings._entries.values()) // 4
    assert tested.stats.evicted > 0
    assert 0 < sum(kept.values()) <= owned + len(tested._beginnings)


def test_an_entry_larger_than_the_cache_is_not_kept(made: Tokenizer) -> None:
    reference = Reference(made)
    tested = cache(reference, max_bytes=10_000)
    small, large = "<|im_start|>small", "<|im_start|>" + "large " * 3000
    for _ in range(2):
        assert tested.encode(small + large)[0].tolist() == reference(small + large).tolist()
    assert tested.stats.hit_chars == len(small)


def hurried(put: Callable[..., Any]) -> Callable[..., Any]:
    """As `put`, but let other threads run between reading and writing the sum."""

    def slow(self: Lru[Any, Any], key: object, value: object, size: int) -> Any:
        held = self.bytes
        time.sleep(0)
        if self.bytes != held:
            raise AssertionError("two threads are in the cache at once")
        return put(self, key, value, size)

    return slow


def test_several_threads_may_encode_at_once(made: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, failures = Reference(made), []
    tested = cache(reference, max_bytes=6_000)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    monkeypatch.setattr(Lru, "put", hurried(Lru.put))
    texts = ["".join(f"<|im_start|>user {i * j % 17}<|im_end|>" for i in range(20)) for j in range(1, 9)]
    expected = {text: reference(text).tolist() for text in texts}

    def run(offset: int) -> None:
        for turn in range(60):
            text = texts[(turn + offset) % len(texts)]
            try:
                if tested.encode(text)[0].tolist() != expected[text]:
                    failures.append(text)
            except (AssertionError, KeyError, RuntimeError) as error:
                failures.append(repr(error))

    threads = [threading.Thread(target=run, args=(offset,)) for offset in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failures
    for lru in (tested._pieces, tested._beginnings):
        assert lru.bytes == sum(cost for _, cost in lru._entries.values())


def test_an_encoder_that_fails_leaves_the_cache_as_it_was(made: Tokenizer) -> None:
    reference = Reference(made)

    def failing(texts: Sequence[str]) -> list[TokenIds]:
        if any("bad" in text for text in texts):
            raise RuntimeError
        return reference.each(texts)

    tested = TokenCache(failing, Cutter(("<s>",), shortest=1), block_size=4, max_bytes=10_000)
    with pytest.raises(RuntimeError):
        tested.encode("<s>good<s>bad")
    assert tested.stats.entries == 0
    assert tested.encode("<s>good")[0].tolist() == reference("<s>good").tolist()


def test_a_piece_that_is_too_long_is_not_encoded() -> None:
    encoded: list[int] = []

    def encode_each(texts: Sequence[str]) -> list[TokenIds]:
        encoded.extend(map(len, texts))
        return [np.zeros(1, dtype=np.uint32) for _ in texts]

    cache = TokenCache(encode_each, Cutter(["<s>"]), block_size=16, max_bytes=0)
    longest = "x" * (MAX_PIECE_CHARS - 3)
    assert len(cache.encode("<s>" + longest + "<s>" + longest)[0]) == 2
    with pytest.raises(TooMuch, match=r"1048577 characters in a row cannot be cut, which is more than 1048576"):
        cache.encode("<s>" + longest + "x")
    assert max(encoded) == MAX_PIECE_CHARS
