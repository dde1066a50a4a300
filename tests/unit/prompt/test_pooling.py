from __future__ import annotations

import json
from typing import Any

import pytest

from matrixinfer.errors import InvalidRequest
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.requests import parse

HELLO = [{"role": "user", "content": "hello"}]


def request(path: str, **fields: Any) -> Prompt:
    return parse(path, json.dumps({"model": "m"} | fields).encode())


def embedding(**fields: Any) -> Prompt:
    return request("/v1/embeddings", **fields)


@pytest.mark.parametrize(
    ("value", "text", "ids", "alone"),
    [
        ("héllo", "héllo", None, True),
        (["héllo"], "héllo", None, True),
        (["héllo", "x"], "héllo", None, False),
        ([1, 2], None, [1, 2], True),
        ([[1, 2], [3]], None, [1, 2], False),
    ],
)
def test_the_first_input_is_embedded_first(value: Any, text: str | None, ids: list[int] | None, alone: bool) -> None:
    prompt = embedding(input=value)
    assert (prompt.text, prompt.counted, prompt.add_special_tokens) == (text, alone, True)
    assert (None if prompt.token_ids is None else prompt.token_ids.tolist()) == ids
    assert not embedding(input=value, add_special_tokens=False).add_special_tokens


@pytest.mark.parametrize(
    ("fields", "alone"),
    [
        ({"messages": HELLO}, True),
        ({"messages": [HELLO, HELLO]}, False),
        ({"input": HELLO}, True),
        ({"input": [HELLO]}, True),
        ({"input": "x", "messages": HELLO}, True),
    ],
)
def test_a_chat_is_embedded_without_a_generation_prompt(fields: dict[str, Any], alone: bool) -> None:
    prompt = embedding(**fields)
    assert prompt.chat is not None
    assert prompt.chat.messages == HELLO
    assert (prompt.chat.add_generation_prompt, prompt.add_special_tokens, prompt.counted) == (False, False, alone)
    prompt = embedding(**fields, add_generation_prompt=True, chat_template_kwargs={"a": 1, "b": None})
    assert prompt.chat is not None
    assert (prompt.chat.add_generation_prompt, prompt.chat.chat_template_kwargs) == (True, {"a": 1})


@pytest.mark.parametrize("value", ["x", [1, 2]])
def test_embedding_truncates_the_end_of_a_prompt(value: Any) -> None:
    prompt = embedding(input=value, truncate_prompt_tokens=8)
    assert (prompt.keep_first, prompt.keep_last, prompt.inexact) == (8, None, None)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_a_ranking_begins_with_its_query(path: str) -> None:
    prompt = request(path, query="q", documents=["a", "b"])
    assert (prompt.path, prompt.text, prompt.counted, prompt.add_special_tokens) == (path, "q", False, True)
    assert prompt.prefix == b"q"


def test_documents_and_further_inputs_have_a_size() -> None:
    ranking = request("/rerank", query="q", documents=["a" * 1000, "b" * 1000])
    assert 2000 < ranking.more_bytes < 2100
    assert embedding(input=["x", "y" * 1000]).more_bytes == 1000
    assert embedding(input=[[1, 2], [3] * 50]).more_tokens == 50
    assert 1000 < embedding(input=[HELLO, [{"role": "user", "content": "y" * 1000}]]).more_bytes < 1200
    assert embedding(input="x").more_bytes == embedding(messages=HELLO).more_bytes == 0


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize("name", ["queries", "data_1", "text_1"])
@pytest.mark.parametrize("value", ["q", ["q", "r"]])
def test_a_score_begins_with_the_first_query(path: str, name: str, value: Any) -> None:
    assert request(path, **{name: value}).text == "q"


@pytest.mark.parametrize("fields", [{"query": {"content": []}}, {"query": "q", "max_tokens_per_query": 4}])
def test_a_query_that_only_the_engine_can_tokenize_is_inexact(fields: dict[str, Any]) -> None:
    prompt = request("/rerank", **fields)
    assert prompt.inexact
    assert prompt.text is None
    assert prompt.prefix


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": [-1]}, "input[0]"),
        ("/v1/embeddings", {"input": [*HELLO, "x"]}, "input"),
        ("/v1/embeddings", {"input": {"role": "user"}}, "input"),
        ("/v1/embeddings", {"messages": []}, "messages"),
        ("/v1/embeddings", {"messages": "x"}, "messages"),
        ("/v1/embeddings", {"messages": [["x"]]}, "messages[0][0]"),
        ("/rerank", {"documents": ["x"]}, "query"),
        ("/rerank", {"query": 3}, "query"),
        ("/score", {"documents": ["x"]}, "queries"),
        ("/score", {"queries": []}, "queries"),
    ],
)
def test_a_bad_request_names_the_field_at_fault(path: str, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        request(path, **fields)
    assert caught.value.param == param
