"""The client sees the model's name that it asked for, however the answer is cut into pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.gateway.model_names import Renamer

ANSWER = (
    b'data: {"id":"x","model":"org/big-1","t":"\\"model\\":\\"org/big-1\\""}\n\n'
    b'data: {"model" : "org/big-1", "model":"org/big-12","model":"other","response":{"model":"big"}}\n\n'
    b'data: {"model":"org/big-1'
)
CHANGED = (
    b'data: {"id":"x","model":"m\\\\1","t":"\\"model\\":\\"org/big-1\\""}\n\n'
    b'data: {"model" : "m\\\\1", "model":"org/big-12","model":"other","response":{"model":"m\\\\1"}}\n\n'
    b'data: {"model":"org/big-1'
)


def renamed(pieces: list[bytes]) -> bytes:
    renamer = Renamer(("org/big-1", "big"), "m\\1")
    return b"".join([*map(renamer.change, pieces), renamer.rest()])


@given(st.lists(st.integers(0, len(ANSWER)), max_size=6))
def test_the_name_is_replaced_wherever_the_stream_is_cut(cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), len(ANSWER)]
    assert renamed([ANSWER[start:end] for start, end in pairwise(bounds)]) == CHANGED


def test_byte_by_byte() -> None:
    assert renamed([ANSWER[i : i + 1] for i in range(len(ANSWER))]) == CHANGED


@pytest.mark.parametrize("chunk", [b"data: hello\n\n", b'data: {"a":"b"}\n\n', b": comment\n\n"])
def test_what_cannot_be_the_name_passes_at_once(chunk: bytes) -> None:
    assert Renamer(("org/big-1",), "m").change(chunk) == chunk
