from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import gigatoken
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from transformers import AutoTokenizer

from matrixinfer.errors import ConfigError
from matrixinfer.prompt import tiktoken_files
from matrixinfer.prompt.base import Chat
from matrixinfer.prompt.encoders import TRICKY_TEXTS
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.prompt.tiktoken_files import FAMILIES, Sliced, Tiktoken, read_ranks
from matrixinfer.prompt.tokenizer_files import read_vocabulary

TOKENS = ("<|bos|>", "<|eos|>", "<|sep|>", "<|im_user|>", "<|im_end|>")
NAMED = {"<|bos|>": 0, "<|eos|>": 1, "<|sep|>": 3, "<|im_user|>": 4, "<|im_end|>": 6}
"""Special tokens and their offset from the end of the ranks; 2 and 5 have no name."""


@pytest.fixture(scope="module")
def rank_lines(deepseek_folder: Path) -> bytes:
    """The byte-level BPE of another model in tiktoken's format: its ids, without gaps, are the ranks."""
    model = json.loads((deepseek_folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = {token["content"] for token in model["added_tokens"]}
    vocabulary = sorted((rank, text) for text, rank in model["model"]["vocab"].items() if text not in added)
    byte_of = _bytes()
    tokens = (bytes(byte_of[char] for char in text) for _, text in vocabulary)
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def _bytes() -> dict[str, int]:
    """The byte for each character of a byte-level vocabulary; printable characters map to themselves."""
    shown = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
    hidden = sorted(set(range(256)) - set(shown))
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def folder(path: Path, lines: bytes, *, name: str = "tiktoken.model", **config: Any) -> Path:
    count = lines.count(b"\n")
    flags = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    decoder = {str(count + i): {"content": token, **flags} for token, i in NAMED.items()}
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(lines)
    written: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "added_tokens_decoder": decoder,
        "chat_template": "{% for m in messages %}<|im_user|>{{ m.content }}<|im_end|>{% endfor %}",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(written | config), encoding="utf-8")
    return path / name


def reference(lines: bytes, family: str, *, reserved: int = 7) -> tiktoken.Encoding:
    ranks = read_ranks(lines)
    tokens = {f"<|reserved_token_{len(ranks) + i}|>": len(ranks) + i for i in range(reserved)}
    named = {token: len(ranks) + i for token, i in NAMED.items()}
    kept = {token: i for token, i in tokens.items() if i not in named.values()}
    return tiktoken.Encoding(
        "reference", pat_str=FAMILIES[family].pattern, mergeable_ranks=ranks, special_tokens=named | kept
    )


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, rank_lines: bytes
) -> tuple[LocalTokenizer, tiktoken.Encoding]:
    name: str = request.param
    file = folder(tmp_path_factory.mktemp(name), rank_lines)
    local = tiktoken_files.load(file, None, name, where="$.models[0]", cache_bytes=1 << 22)
    return local, reference(rank_lines, name, reserved=FAMILIES[name].reserved or 7)


PIECES = (
    *TRICKY_TEXTS,
    *TOKENS,
    *("<|eos|", "<|reserved_token_127999|>", "\n", "\r\n", "  ", "\n \n", "'S", "'ſ", "éÉ", "e\u0301"),
    *("日本", "々〇", "ー", "ㆍ", "한", "٣", "½", "\u200d", "\u2028", "\x85", "\x1c", "ǅ", "ʰ", "K", "/", "\u3000"),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=20), st.sampled_from(PIECES)), max_size=12).map("".join))
def test_any_text_has_the_ids_of_tiktoken(family: tuple[LocalTokenizer, tiktoken.Encoding], text: str) -> None:
    local, expected = family
    assert local.name == "gigatoken"
    assert local.encode(text, add_special_tokens=False).tolist() == expected.encode(text, allowed_special="all")
    assert local.encode(text, add_special_tokens=True).tolist() == expected.encode(text, allowed_special="all")


def test_a_long_text_that_is_cut_for_the_cache_has_the_ids_of_tiktoken(
    family: tuple[LocalTokenizer, tiktoken.Encoding],
) -> None:
    local, expected = family
    lines = "\nLine ".join(TRICKY_TEXTS) * 40
    for text in (lines, lines.join(TOKENS), lines + "<|im_end|>" + lines, lines + "x"):
        assert local.encode(text, add_special_tokens=False).tolist() == expected.encode(text, allowed_special="all")
    assert local.cache_stats.hit_chars > len(lines)


def test_chats_are_rendered_by_the_template_beside_the_ranks(
    family: tuple[LocalTokenizer, tiktoken.Encoding],
) -> None:
    local, expected = family
    text = local.render(Chat(messages=[{"role": "user", "content": "Grüezi"}]))
    assert text == "<|im_user|>Grüezi<|im_end|>"
    ids = local.encode(text, add_special_tokens=False)
    assert ids.tolist() == expected.encode(text, allowed_special="all")
    assert local.decode(ids) == text.encode()


@pytest.mark.parametrize("name", ["tokenizer.model", "tiktoken.model"])
@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}])
@pytest.mark.filterwarnings("ignore")
def test_the_ids_are_those_of_transformers(
    tmp_path: Path, rank_lines: bytes, name: str, config: dict[str, Any]
) -> None:
    file = folder(tmp_path, rank_lines[: rank_lines.index(b" 3000\n") + 6], name=name, **config)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    ours = tiktoken_files.load(file, None, None, where="$.models[0]")
    draw = random.Random(5)
    for text in (*TRICKY_TEXTS, *("".join(draw.choices(PIECES, k=9)) for _ in range(100))):
        for add in (False, True):
            expected = theirs(text, add_special_tokens=add)["input_ids"]
            assert ours.encode(text, add_special_tokens=add).tolist() == expected


def test_an_encoder_that_differs_from_tiktoken_is_not_used(
    tmp_path: Path, rank_lines: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder(tmp_path, rank_lines)
    honest = gigatoken.Tokenizer.from_tiktoken
    monkeypatch.setattr(gigatoken.Tokenizer, "from_tiktoken", lambda path, _, tokens: honest(path, "qwen2", tokens))
    with capture_logs() as logs:
        local = tiktoken_files.load(file, None, "cl100k", where="$.models[0]")
    assert local.name == "tiktoken"
    assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == ["gigatoken_mismatched"]
    assert local.encode("12345", add_special_tokens=False).tolist() == reference(rank_lines, "cl100k").encode("12345")


def test_ranks_that_gigatoken_cannot_read_are_encoded_by_tiktoken(tmp_path: Path, rank_lines: bytes) -> None:
    first, _, rest = rank_lines.partition(b"\n")
    file = folder(tmp_path, rest + b"\n" + first.replace(b" 0", b" 999999"))
    assert tiktoken_files.load(file, None, "cl100k", where="$.models[0]").name == "tiktoken"


def sliced_as_kimi_does(text: str) -> list[str]:
    """Kimi's rule, applied character by character."""
    pieces: list[str] = []
    for begin in range(0, len(text), 400_000):
        part, start, run = text[begin : begin + 400_000], 0, 0
        for i, char in enumerate(part):
            run = run + 1 if i and char.isspace() == part[i - 1].isspace() else 1
            if run > 25_000:
                pieces.append(part[start:i])
                start, run = i, 1
        pieces.append(part[start:])
    return pieces


@pytest.mark.parametrize(
    "text",
    [
        "ab" * 12_500 + " x",
        "a" * 25_001,
        "x " + "ab" * 40_000 + " y",
        " " * 60_000 + "z",
        "word " * 90_000,
        "長" * 30_000,
    ],
)
def test_long_texts_are_sliced_as_kimi_does(rank_lines: bytes, text: str) -> None:
    encoding = reference(rank_lines, "kimi", reserved=258)
    sliced = Sliced(Tiktoken(encoding), NAMED)
    expected = [i for piece in sliced_as_kimi_does(text) for i in encoding.encode(piece)]
    assert sliced.encode(text).tolist() == expected
    split = encoding.encode("<|sep|>", allowed_special="all")
    assert sliced.encode(f"{text}<|sep|>{text}").tolist() == [*expected, *split, *expected]


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("tokenizer.model", {}, "cl100k"),
        ("tiktoken.model", {}, "cl100k"),
        ("cl100k_base.tiktoken", {}, "cl100k"),
        ("o200k_base.tiktoken", {}, "o200k"),
        ("tiktoken.model", {"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}}, "kimi"),
    ],
)
def test_the_pattern_is_known_if_the_folder_determines_it(
    tmp_path: Path, name: str, config: dict[str, Any], expected: str
) -> None:
    file = folder(tmp_path, b"YQ== 0\n", name=name, **config)
    files = read_vocabulary(file, where="$")
    assert tiktoken_files.family_of(files, None, where="$") == expected
    assert tiktoken_files.family_of(files, "qwen2", where="$") == "qwen2"


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("model.tiktoken", {}),
        ("tiktoken.model", {"auto_map": {"AutoTokenizer": ["tokenization_other.Tokenizer", None]}}),
    ],
)
def test_the_pattern_is_never_guessed(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    file = folder(tmp_path, b"YQ== 0\n", name=name, **config)
    with pytest.raises(ConfigError, match=r"^\$\.models\[0\]\.pretokenizer: .*cl100k, kimi, o200k, qwen2"):
        tiktoken_files.load(file, None, None, where="$.models[0]")


@pytest.mark.parametrize(
    ("lines", "config", "why"),
    [
        (b"YQ== 0\nnot base64! 1\n", {}, "not a usable tokenizer"),
        (b"YQ==\n", {}, "not a usable tokenizer"),
        (b"YQ== 0\n", {"added_tokens_decoder": {}}, "has no special tokens"),
        (b"YQ== 0\n", {"added_tokens_decoder": {"1": {"content": "<x>", "rstrip": True}}}, "flags that tiktoken"),
        (
            b"YQ== 0\n",
            {"added_tokens_decoder": {"1": {"content": "<x>"}, "2": {"content": "<x>y"}}},
            "starts with another",
        ),
        (b"YQ== 0\n", {"added_tokens_decoder": {"one": {"content": "<x>"}}}, "not a usable tokenizer"),
    ],
)
def test_a_broken_vocabulary_is_a_config_error(tmp_path: Path, lines: bytes, config: dict[str, Any], why: str) -> None:
    file = folder(tmp_path, lines, **config)
    with pytest.raises(ConfigError, match=rf"^\$\.models\[0\]\.tokenizer: .*{why}"):
        tiktoken_files.load(file, None, None, where="$.models[0]")
