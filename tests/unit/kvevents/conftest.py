"""Small pages of tokens, so that every test of ledgers also covers runs of many pages."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def small_pages() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matrixinfer.kvevents.tokens._PAGE", 8)
        patch.setattr("matrixinfer.kvevents.tokens._PAGE_BYTES", 32)
        yield
