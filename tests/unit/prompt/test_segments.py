from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from matrixinfer.prompt.segments import Cutter, cutter_of
from tests.unit.prompt.support import TEXTS

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
PATTERNS = {
    "qwen2": rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{BLANKS}",
    "llama3": rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{BLANKS}",
    "qwen3.5": rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    rf"|{BLANKS}",
    "gpt-oss": rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BLANKS}",
}
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

fragments = st.sampled_from(
    [
        *("<s>", "<|im_start|>", "<|im_end|>", "<|im_", "|>", "<", "s>"),
        *(
            "a",
            "B",
            "word",
            "it's",
            "I'LL",
            "1",
            "12345",
            "ü",
            "e\u0301",
            "中文",
            "한",
            "😀",
            "!",
            "...",
            "/",
            "\u0301",
        ),
        *(" ", "  ", "\t", "\n", "\n\n", "\r\n", "\r", "\u00a0", "\u2028"),
    ]
)
texts = st.lists(fragments, max_size=60).map("".join)


def made(pattern: str, normalizer: normalizers.Normalizer | None = None, *tokens: AddedToken) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(each, special=True, normalized=False) for each in ("<s>", "<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS[:6], "\n\n \n\n\t\n  \n x" * 40, "a\n\nB \n\nC" * 40], trainer)
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def spec(tokenizer: Tokenizer) -> dict[str, Any]:
    return dict(json.loads(tokenizer.to_str()))


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.fixture(scope="module")
def families(deepseek_folder: Path) -> Mapping[str, Tokenizer]:
    return {
        **{name: made(pattern) for name, pattern in PATTERNS.items()},
        "qwen2 with NFC": made(PATTERNS["qwen2"], normalizers.NFC()),
        "deepseek": Tokenizer.from_file(str(deepseek_folder / "tokenizer.json")),
    }


def test_the_pieces_have_the_ids_of_the_whole(
    families: Mapping[str, Tokenizer],
) -> None:
    templates = "<s><|im_start|><|im_end|><｜User｜>"
    cutters = {name: cutter_of(spec(tokenizer), [templates], shortest=1) for name, tokenizer in families.items()}
    assert all(cutter.tokens and cutter.lines for cutter in cutters.values())

    @given(texts)
    def check(text: str) -> None:
        for name, tokenizer in families.items():
            pieces = cutters[name].cut(text)
            assert "".join(pieces) == text
            assert all(pieces)
            assert [id_ for piece in pieces for id_ in ids(tokenizer, piece)] == ids(tokenizer, text), name

    check()


@pytest.mark.parametrize("shortest", [1, 8, 64])
@given(texts, texts)
def test_a_longer_text_keeps_all_pieces_but_the_last(shortest: int, text: str, more: str) -> None:
    cutter = Cutter(("<s>", "<|im_start|>"), lines=True, shortest=shortest)
    kept = cutter.cut(text)[:-1]
    assert all(len(piece) >= shortest for piece in kept)
    assert cutter.cut(text + more)[: len(kept)] == kept


def test_long_pieces_are_cut_at_lines() -> None:
    line = "x" * 99 + "\n"
    text = "<s>" + line * 50 + "<s>"
    pieces = Cutter(("<s>",), lines=True, shortest=1000).cut(text)
    assert [len(piece) for piece in pieces] == [2003, 2100, 903]
    assert "".join(pieces) == text
    assert Cutter(("<s>",), shortest=1000).cut(text) == [text[:-3], "<s>"]


def test_without_a_template_texts_are_cut_at_all_safe_tokens() -> None:
    tokenizer = made(PATTERNS["qwen2"])
    assert set(cutter_of(spec(tokenizer), []).tokens) == {"<s>", "<|im_start|>", "<|im_end|>"}
    assert cutter_of(spec(tokenizer), ["{{ '<|im_end|>' }}"]).tokens == ["<|im_end|>"]


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("<x>", lstrip=True, normalized=False),
        AddedToken("<x>", rstrip=True, normalized=False),
        AddedToken("<x>", single_word=True, normalized=False),
        AddedToken("word", normalized=False),
        AddedToken(" <x>", normalized=False),
    ],
)
def test_texts_are_not_cut_at_tokens_that_flags_extend(token: AddedToken) -> None:
    tokens = cutter_of(spec(made(PATTERNS["qwen2"], None, token)), []).tokens
    assert set(tokens) == {"<s>", "<|im_start|>", "<|im_end|>"}


@pytest.mark.parametrize("other", ["a<s>", "x<", "a<|im_start|>b", "y<s"])
def test_texts_are_not_cut_at_tokens_that_others_overlap(other: str) -> None:
    tokenizer = made(PATTERNS["qwen2"], None, AddedToken(other, normalized=False))
    tokens = set(cutter_of(spec(tokenizer), []).tokens)
    assert tokens < {"<s>", "<|im_start|>", "<|im_end|>", other}
    for token in ("<s>", "<|im_start|>"):
        for text in (f"a{token}b", f"xy{token}", f"{other}{token}", other, f"x{other[1:]}"):
            cut = Cutter(sorted(tokens), shortest=1).cut(text)
            assert [id_ for piece in cut for id_ in ids(tokenizer, piece)] == ids(tokenizer, text)


def test_texts_are_not_cut_at_tokens_that_a_normalizer_may_change() -> None:
    token = AddedToken("<N>", normalized=True)
    assert "<N>" in cutter_of(spec(made(PATTERNS["qwen2"], None, token)), []).tokens
    assert "<N>" not in cutter_of(spec(made(PATTERNS["qwen2"], normalizers.NFC(), token)), []).tokens


def _with(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    tokenizer = spec(made(PATTERNS["qwen2"]))
    change(tokenizer)
    return tokenizer


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("pre_tokenizer", {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}),
        ("pre_tokenizer", {"type": "SomethingNew"}),
        ("normalizer", {"type": "Prepend", "prepend": "▁"}),
        ("normalizer", {"type": "Strip", "strip_left": True, "strip_right": True}),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": " +"}, "content": "▁"}),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Precompiled"}]}),
    ],
)
def test_unknown_components_disable_cutting(part: str, value: object) -> None:
    cutter = cutter_of(_with(lambda tokenizer: tokenizer.update({part: value})), [])
    assert (list(cutter.tokens), cutter.lines) == ([], False)


def test_patterns_that_look_across_lines_are_not_cut_at_lines() -> None:
    tokenizer = made(GPT2)
    cutter = cutter_of(spec(tokenizer), [])
    assert cutter.tokens
    assert not cutter.lines
    # The reason: blanks before a letter are treated differently from blanks at the end of a text.
    assert ids(tokenizer, "a\n\n") + ids(tokenizer, "B") != ids(tokenizer, "a\n\nB")


def test_an_added_token_with_a_line_break_forbids_cuts_at_lines() -> None:
    tokenizer = made(PATTERNS["qwen2"], None, AddedToken("\nAnswer", normalized=False))
    assert not cutter_of(spec(tokenizer), []).lines


@pytest.mark.parametrize("pattern", ["qwen2", "gpt-oss"])
@given(text=texts, more=texts)
def test_what_is_settled_does_not_depend_on_what_follows(pattern: str, text: str, more: str) -> None:
    tokenizer = made(PATTERNS[pattern], None, AddedToken("<|im_start|>", normalized=False))
    settled = cutter_of(json.loads(tokenizer.to_str()), ()).settled(text)
    assert text.startswith(settled)
    ids = tokenizer.encode(settled).ids
    assert tokenizer.encode(text + more).ids[: len(ids)] == ids


def test_nothing_is_settled_before_the_first_token() -> None:
    assert Cutter(("<image>",)).settled("USER: Hello") == ""
    assert Cutter().settled("USER: Hello") == ""
    assert Cutter(("<image>", "<s>")).settled("<s>USER<image>Hello") == "<s>USER"


def test_lines_are_not_cut_if_a_token_strips_the_line_break_before_it() -> None:
    for token in (AddedToken("Answer", lstrip=True), AddedToken("\nA")):
        assert not cutter_of(json.loads(made(PATTERNS["qwen2"], None, token).to_str()), ()).lines
    for token in (AddedToken("Answer"), AddedToken("<|x|>", lstrip=True)):
        assert cutter_of(json.loads(made(PATTERNS["qwen2"], None, token).to_str()), ()).lines
