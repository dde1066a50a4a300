from __future__ import annotations

import pytest

from matrixinfer.prompt.local import LocalTokenizer

from .fleet import TOKENIZER


@pytest.fixture(scope="session")
def tokenizer() -> LocalTokenizer:
    return LocalTokenizer.load(TOKENIZER, "chatml")
