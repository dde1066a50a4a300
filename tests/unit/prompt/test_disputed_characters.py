from __future__ import annotations

import pytest

from matrixinfer.prompt.disputed_characters import has_disputed_characters


@pytest.mark.parametrize(
    "text", ["", "plain", "naïve café", "Ελλάδα Россия", "今天 日本 한국", "😀👩‍👩‍👧‍👦🏳️‍🌈", "\U0010ffff"]
)
def test_characters_that_all_libraries_know_are_not_disputed(text: str) -> None:
    assert not has_disputed_characters(text.encode())


@pytest.mark.parametrize("character", ["\u088f", "\ufbc3", "\U00010940", "\U0001f6d8", "\U00033479"])
def test_one_disputed_character_is_found_in_a_long_text(character: str) -> None:
    assert has_disputed_characters(f"{'中文 word ' * 5000}{character}{'中文 word ' * 5000}".encode())
