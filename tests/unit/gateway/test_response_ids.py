from __future__ import annotations

import pytest

from matrixinfer.gateway.response_ids import ResponseId

WHOLE = b'{"id":"resp_1","object":"response","output":[{"id":"msg_2"}]}'
STREAM = (
    b'event: response.created\ndata: {"type":"response.created","response":{"id":"resp_1","x":1}}\n\n'
    b'event: response.output_item.added\ndata: {"item":{"id":"msg_2"}}\n\n'
)


@pytest.mark.parametrize("answer", [WHOLE, STREAM])
def test_the_first_id_is_the_responses_own_however_the_answer_is_cut(answer: bytes) -> None:
    for size in (1, 7, len(answer)):
        assert found_in([answer[start : start + size] for start in range(0, len(answer), size)]) == [("resp_1", "a")]


def found_in(chunks: list[bytes]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    reader = ResponseId(lambda *pair: found.append(pair))
    for chunk in chunks:
        reader.add(chunk, "a")
    return found


def test_an_answer_without_an_id_is_not_kept() -> None:
    assert found_in([b"x" * 20_000, WHOLE]) == []
