"""The body that a pod gets."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from msgspec.structs import replace

from matrixinfer.config import ModelConfig, PodConfig, PodWatchConfig
from matrixinfer.errors import InvalidRequest
from matrixinfer.gateway.rewrite import BodyRewriter, PodBody
from matrixinfer.pods.engine_kind import EngineFacts, EngineKind
from matrixinfer.pods.publishers import KvSource
from matrixinfer.pods.registry import PodRegistry, ServedNames
from matrixinfer.prompt import fields
from matrixinfer.prompt.openai import COMPLETIONS_PATH
from matrixinfer.prompt.requests import parse

MODELS = (ModelConfig(name="m", aliases=("nice",)), ModelConfig(name="lora", aliases=("fine",)))


def rewrite(
    body: bytes,
    *,
    adds_usage: bool = False,
    engine: EngineKind = "vllm",
    rank: int | None = None,
    default: str = "m",
) -> PodBody:
    """The body for a pod that knows `m`, `also` and `lora`, with ranks from 8 on. `default` is meant where it names none."""
    registry = PodRegistry(
        [PodConfig(name="a", url="http://a", kv_events="none")], MODELS, PodWatchConfig(), time.monotonic
    )
    served = ServedNames(base_model="m", aliases=frozenset({"m", "also"}), adapters={"lora": "m"})
    sources = tuple(KvSource(endpoint="tcp://a:1", rank=rank) for rank in (8, 9))
    registry.learn("a", served=served, facts=EngineFacts(kind=engine), kv_sources=sources)
    prompt = parse(COMPLETIONS_PATH, body)
    prompt = replace(prompt, model=prompt.model or default)
    return BodyRewriter(registry, adds_usage=adds_usage).body_for("a", prompt, body, rank)


def request(**fields: object) -> bytes:
    return json.dumps({"model": "m", "prompt": [1, 2, 3], **fields}).encode()


@pytest.mark.parametrize(
    ("name", "expected"), [("m", "m"), ("also", "also"), ("lora", "lora"), ("nice", "m"), ("fine", "lora")]
)
def test_the_body_is_the_clients_own_unless_the_pod_does_not_know_the_name(name: str, expected: str) -> None:
    body = request(model=name, temperature=0.1, odd={"b": 1, "a": [1.0, 2]})
    rewritten = rewrite(body)
    assert json.loads(rewritten.bytes) == {**json.loads(body), "model": expected}
    assert (rewritten.bytes is body) == (name == expected)
    assert not rewritten.adds_usage


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (None, {"include_usage": True}),
        ({"include_usage": False, "odd": 1}, {"include_usage": True, "odd": 1}),
        ({"continuous_usage_stats": True}, {"include_usage": True}),
        ({"include_usage": True, "continuous_usage_stats": True}, None),
        ({"include_usage": "true"}, None),
        (False, None),
        ([], None),
    ],
)
@pytest.mark.parametrize("name", ["m", "nice"])
def test_usage_is_asked_for_once_at_the_end_unless_the_client_asks_or_errs(name: str, options: Any, asked: Any) -> None:
    body = request(model=name, stream=True, stream_options=options)
    rewritten = rewrite(body, adds_usage=True)
    assert json.loads(rewritten.bytes) == {**json.loads(body), "model": "m", "stream_options": asked or options}
    assert (rewritten.bytes is body) == (asked is None and name == "m")
    assert rewritten.adds_usage == (asked is not None)


def test_usage_is_asked_for_in_streams_only() -> None:
    body = request(stream_options=None)
    assert rewrite(body, adds_usage=True) == PodBody(body, adds_usage=False)
    assert rewrite(body, adds_usage=True).bytes is body


@pytest.mark.parametrize("options", [b'{"x": "\xff"}', b'{"x": 1e999, "y": 1.0000000000000000001}'])
def test_options_are_passed_on_as_they_are_even_where_they_cannot_be_read(options: bytes) -> None:
    body = request(stream=True).removesuffix(b"}") + b', "stream_options": ' + options + b"}"
    rewritten = rewrite(body, adds_usage=True)
    assert rewritten.adds_usage
    before, _, after = rewritten.bytes.rpartition(b',"include_usage":true}')
    assert (before[-3:], after) == (options[-4:-1], b"}")


@pytest.mark.parametrize(
    "options", [b'{"\xff": 1}', b'"\xff"', b'{"include_usage": "\xff"}', b'{"include_usage": 1e999}']
)
def test_options_that_cannot_be_read_stay(options: bytes) -> None:
    body = request(stream=True).removesuffix(b"}") + b', "stream_options": ' + options + b"}"
    assert rewrite(body, adds_usage=True) == PodBody(body, adds_usage=False)


def test_a_stream_without_options_keeps_its_bytes_and_gets_them_at_its_end() -> None:
    body = b'{ "model":"m", "prompt" : [1], "stream":true,"x":1.50 }\n'
    expected = b'{ "model":"m", "prompt" : [1], "stream":true,"x":1.50,"stream_options":{"include_usage":true}}'
    assert rewrite(body, adds_usage=True) == PodBody(expected, adds_usage=True)


def test_a_body_whose_keys_are_not_utf_8_stays_unless_the_pod_needs_another_name() -> None:
    body = request(stream=True, stream_options=None).removesuffix(b"}") + b', "\xff": 1}'
    assert rewrite(body, adds_usage=True) == PodBody(body, adds_usage=False)
    with pytest.raises(InvalidRequest, match="not UTF-8"):
        rewrite(body.replace(b'"m"', b'"nice"'))


def test_a_rank_is_asked_for_as_the_engine_counts_it() -> None:
    body = request(odd={"b": 1})
    assert rewrite(body, rank=9) == PodBody(body, adds_usage=False, rank=1)
    assert rewrite(body, engine="other", rank=8) == PodBody(body, adds_usage=False, rank=0)
    assert rewrite(body, engine="sglang") == PodBody(body, adds_usage=False, rank=None)


@pytest.mark.parametrize("space", [b"", b" \r\n\t"])
def test_sglang_gets_the_rank_in_the_body_beside_the_client_s_own_bytes(space: bytes) -> None:
    body = b' {"model":"m", "prompt" : [1,2], "x":1.0000000000000000001 }' + space
    rewritten = rewrite(body, engine="sglang", rank=9)
    assert rewritten.bytes == b' {"model":"m", "prompt" : [1,2], "x":1.0000000000000000001 ,"routed_dp_rank":1}'
    assert rewritten.rank == 1


@pytest.mark.parametrize("field", ["routed_dp_rank", "data_parallel_rank", "routed\\u005fdp_rank"])
@pytest.mark.parametrize("name", ["m", "nice"])
def test_a_rank_that_the_client_names_gives_way(field: str, name: str) -> None:
    body = f'{{"model": "{name}", "prompt": [1, 2, 3], "{field}": 5, "seed": 1}}'.encode()
    sent = json.loads(rewrite(body, engine="sglang", rank=9).bytes)
    assert sent == {"model": "m", "prompt": [1, 2, 3], "seed": 1, "routed_dp_rank": 1}


def test_rank_name_and_usage_go_together() -> None:
    rewritten = rewrite(request(model="nice", stream=True), adds_usage=True, engine="sglang", rank=8)
    sent = json.loads(rewritten.bytes)
    assert (sent["model"], sent["routed_dp_rank"], sent["stream_options"]) == ("m", 0, {"include_usage": True})
    assert (rewritten.adds_usage, rewritten.rank) == (True, 0)


def test_a_body_whose_keys_are_not_utf_8_gets_its_rank_all_the_same() -> None:
    body = request().removesuffix(b"}") + b', "\xff": 1, "data_parallel_rank": 3}'
    assert rewrite(body, engine="sglang", rank=9).bytes == body[:-1] + b',"routed_dp_rank":1}'


@pytest.mark.parametrize("given", [{}, {"model": None}, {"model": ""}])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_body_that_names_no_model_gets_the_pod_s_name_of_it(given: dict[str, Any], engine: EngineKind) -> None:
    body = json.dumps({**given, "prompt": [1, 2, 3], "odd": 1.50}).encode() + b" \n"
    sent = rewrite(body, engine=engine, rank=9, default="nice").bytes
    assert sent.startswith(body.rstrip()[:-1])
    assert json.loads(sent)["model"] == "m"
    assert json.loads(sent).get("routed_dp_rank") == (1 if engine == "sglang" else None)


def test_usage_is_asked_for_where_no_model_is_named_as_well() -> None:
    sent = rewrite(b'{"prompt":[1],"stream":true}', adds_usage=True, default="nice")
    assert json.loads(sent.bytes) == {
        "model": "m",
        "prompt": [1],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_body_of_too_many_fields_is_not_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields, "MOST_FIELDS", 5)
    body = request(stream=True, stream_options={}, a=1, b=2)
    assert rewrite(body, adds_usage=True) == PodBody(body, adds_usage=False)
    pinned = rewrite(request(a=1, b=2, c=3, routed_dp_rank=7), engine="sglang", rank=9).bytes
    assert json.loads(pinned)["routed_dp_rank"] == 1
    with pytest.raises(InvalidRequest, match="too many fields"):
        rewrite(request(model="nice", a=1, b=2, c=3, d=4))
