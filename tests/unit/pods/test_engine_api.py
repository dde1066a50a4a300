from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from matrixinfer.pods.engine_api import parse_models, parse_version
from matrixinfer.pods.metrics_text import parse_metrics
from matrixinfer.pods.publishers import KvSource, parse_kv_sources

VLLM = b"""\
# HELP python_gc_objects_collected_total Objects collected during gc
# TYPE python_gc_objects_collected_total counter
python_gc_objects_collected_total{generation="0"} 11021.0
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
vllm:num_requests_running{engine="1",model_name="tiny"} 4.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="tiny"} 0.0
vllm:num_requests_waiting{engine="1",model_name="tiny"} 2.0
# HELP vllm:num_requests_waiting_by_reason Number of requests waiting by reason.
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="capacity"} 40.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="tiny"} 0.5
"""
OLD_VLLM = b"""\
vllm:num_requests_running{model_name="a {b} c"} 1
vllm:num_requests_waiting{model_name="a {b} c"} 0
vllm:gpu_cache_usage_perc{model_name="a {b} c"} 0.125
"""
BROKEN = (
    b"\xff",
    b'"\xff"',
    b'{"data":[{"id":"\xff"}],"version":"\xff"}',
    b'{"data":' + b"[" * 5000 + b"]" * 5000 + b"}",
)
SGLANG = b"""\
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="m",tp_rank="0"} 7.0
sglang:num_queue_reqs{model_name="m",tp_rank="0"} 1.0
sglang:token_usage{model_name="m",tp_rank="0"} 0.28
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [(VLLM, (7, 2, 0.5)), (OLD_VLLM, (1, 0, 0.125)), (SGLANG, (7, 1, 0.28)), (b"", (None, None, None))],
    ids=["vllm", "old vllm", "sglang", "nothing"],
)
def test_load_is_read_under_the_names_of_every_engine(text: bytes, expected: tuple[object, ...]) -> None:
    metrics = parse_metrics(text, read_at=5.0)
    assert (metrics.running, metrics.waiting, metrics.cache_usage) == expected
    assert metrics.read_at == 5.0


def test_several_ranks_are_reported_separately() -> None:
    ranks = parse_metrics(VLLM, read_at=0.0).ranks
    assert {rank: (each.waiting, each.cache_usage) for rank, each in ranks.items()} == {0: (0, 0.25), 1: (2, 0.5)}
    assert parse_metrics(SGLANG, read_at=0.0).ranks == {}
    assert parse_metrics(b'vllm:num_requests_running{engine="0"} 3', read_at=0.0).ranks == {}


@pytest.mark.parametrize(
    "text",
    [
        b"vllm:num_requests_running",
        b"vllm:num_requests_running{",
        b"vllm:num_requests_running ",
        b'vllm:num_requests_running{a="b"} NaN',
        b'vllm:num_requests_running{a="b"} +Inf',
        b'vllm:num_requests_running{a="b"} many',
        b"# HELP vllm:num_requests_running 5",
        b"vllm:num_requests_running_max 5",
        b"\x00\xff\n" * 3,
    ],
)
def test_a_missing_sample_is_unknown_and_not_zero(text: bytes) -> None:
    assert parse_metrics(text, read_at=0.0).running is None


def test_a_sum_without_end_is_unknown() -> None:
    text = b'vllm:num_requests_running{engine="0"} 1e308\nvllm:num_requests_running{engine="1"} 1.7e308\n'
    assert parse_metrics(text, read_at=0.0).running is None


def test_a_timestamp_after_the_value_is_ignored() -> None:
    assert parse_metrics(b"vllm:num_requests_running 5 1395066363000", read_at=0.0).running == 5


@given(st.lists(st.tuples(st.text(max_size=8), st.integers(0, 1000)), max_size=5, unique_by=lambda pair: pair[0]))
def test_sums_agree_with_prometheus_client(series: list[tuple[str, int]]) -> None:
    registry = CollectorRegistry()
    for name in ("vllm:num_requests_running_before", "vllm:num_requests_running", "vllm:num_requests_running_z"):
        gauge = Gauge(name, "Text with vllm:num_requests_running 9 inside.", ["model_name"], registry=registry)
        for label, value in series:
            gauge.labels(label).set(value)
    metrics = parse_metrics(generate_latest(registry), read_at=0.0)
    assert metrics.running == (sum(value for _, value in series) if series else None)


def test_the_first_name_without_a_parent_is_the_engine_s_own() -> None:
    cards = [
        {"id": "lora0", "object": "model", "parent": "tiny"},
        {"id": "tiny", "object": "model", "root": "model/tiny", "parent": None, "permission": [{"x": 1}]},
        {"id": "tiny-latest", "parent": None},
        {"id": "lora1", "parent": "tiny"},
    ]
    served = parse_models(msgspec.json.encode({"object": "list", "data": cards}))
    assert served is not None
    assert served.base_model == "tiny"
    assert served.aliases == {"tiny", "tiny-latest"}
    assert served.adapters == {"lora0": "tiny", "lora1": "tiny"}


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"data":[]}', b'{"data":[{"id":1}]}', b'{"data":[{"id":"a","parent":"b"}]}', *BROKEN]
)
def test_a_model_list_without_a_base_model_is_ignored(body: bytes) -> None:
    assert parse_models(body) is None


def test_event_sources_are_read_in_the_form_of_vllm_0_32() -> None:
    one = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": "tcp://*:5557",
        "replay_endpoint": "tcp://*:5558",
        "buffer_steps": 10000,
        "topic": "kv-events",
    }
    others = {"10": one | {"endpoint": "tcp://*:5567"}, "2": one | {"endpoint": "tcp://*:5559"}}
    sources = parse_kv_sources(msgspec.json.encode({"0": one, **others}), host="10.0.0.7")
    assert [source.endpoint for source in sources] == [f"tcp://10.0.0.7:{port}" for port in (5557, 5559, 5567)]
    assert sources[0] == KvSource(endpoint="tcp://10.0.0.7:5557", replay_endpoint="tcp://10.0.0.7:5558", rank=0)
    assert [source.rank for source in sources] == [0, 2, 10]


def test_event_sources_are_read_in_the_form_of_a_list() -> None:
    body = msgspec.json.encode(
        [{"data_parallel_rank": 0, "endpoint": "tcp://10.0.0.1:5557", "replay_endpoint": None, "topic": ""}]
    )
    assert parse_kv_sources(body, host="h") == (KvSource(endpoint="tcp://10.0.0.1:5557", rank=0),)


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("tcp://*:1", "tcp://[::1]:1"),
        ("tcp://0.0.0.0:1", "tcp://[::1]:1"),
        ("tcp://[::]:1", "tcp://[::1]:1"),
        ("tcp://h:1", "tcp://h:1"),
        ("ipc:///tmp/x", "ipc:///tmp/x"),
    ],
)
def test_only_wildcard_addresses_are_replaced_by_the_pod_s_host(endpoint: str, expected: str) -> None:
    (source,) = parse_kv_sources(msgspec.json.encode([{"endpoint": endpoint}]), host="::1")
    assert source.endpoint == expected


@pytest.mark.parametrize(
    "answer",
    [
        None,
        5,
        {"detail": "Not Found"},
        [{"endpoint": None}],
        [{"endpoint": "tcp://*:1", "publisher": "null"}],
        [{"endpoint": "tcp://*:1", "enable_kv_cache_events": False}],
    ],
)
def test_sources_that_do_not_publish_are_left_out(answer: object) -> None:
    assert parse_kv_sources(msgspec.json.encode(answer), host="h") == ()


@pytest.mark.parametrize("body", BROKEN)
def test_an_answer_that_cannot_be_read_says_nothing(body: bytes) -> None:
    assert parse_kv_sources(body, host="h") == ()
    assert parse_version(body) is None


def test_hits_and_block_size_are_read() -> None:
    text = b"""\
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="tiny"} 96.0
vllm:prefix_cache_hits_total{engine="1",model_name="tiny"} 4.0
# TYPE vllm:prefix_cache_hits_created gauge
vllm:prefix_cache_hits_created{engine="0",model_name="tiny"} 1.7e+09
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="32",cache_dtype="auto",engine="0",num_gpu_blocks="100"} 1.0
"""
    metrics = parse_metrics(text, read_at=0.0)
    assert (metrics.prefix_hits, metrics.block_size, metrics.cache_tokens) == (100, 32, 3_200)
    assert parse_metrics(b'sglang:max_total_num_tokens{dp_rank="0"} 4096\n', read_at=0.0).cache_tokens == 4_096
    assert parse_metrics(text.replace(b'"100"', b'"None"'), read_at=0.0).cache_tokens is None
    assert {rank: each.prefix_hits for rank, each in metrics.ranks.items()} == {0: 96, 1: 4}
    loaded = b'vllm:external_prefix_cache_hits_total{engine="1"} 32.0\n'
    looked_up = b'vllm:prefix_cache_queries_total{engine="0"} 200\nvllm:prefix_cache_queries_total{engine="1"} 50\n'
    metrics = parse_metrics(text + loaded + looked_up, read_at=0.0)
    assert (metrics.prefix_hits, metrics.prefix_queries) == (132, 250)
    assert (metrics.ranks[1].prefix_hits, metrics.ranks[1].prefix_queries) == (36, 50)
    assert parse_metrics(loaded, read_at=0.0).prefix_hits is None
    assert (parse_metrics(VLLM, read_at=0.0).prefix_hits, parse_metrics(VLLM, read_at=0.0).block_size) == (None, None)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (b'block_size="16",enable_prefix_caching="True"', (16, True)),
        (b'enable_prefix_caching="False",block_size="32"', (32, False)),
        (b'page_size="64"', (64, None)),
        (b'block_size="0"', (None, None)),
        (b'block_size="None",enable_prefix_caching="None"', (None, None)),
    ],
)
def test_the_cache_s_settings_are_read_from_its_info(labels: bytes, expected: tuple[object, ...]) -> None:
    text = (
        b"# HELP x\nvllm:cache_config_info{" + labels + b'} 1.0\nother{block_size="8",enable_prefix_caching="True"} 1\n'
    )
    metrics = parse_metrics(text, read_at=0.0)
    assert (metrics.block_size, metrics.prefix_caching) == expected


@pytest.mark.parametrize(("reported", "expected"), [(8192, 8192), (None, None), ("8192", None)])
def test_the_context_length_is_that_of_the_first_name(reported: object, expected: int | None) -> None:
    served = parse_models(msgspec.json.encode({"data": [{"id": "m", "max_model_len": reported}, {"id": "n"}]}))
    assert served is not None
    assert served.context_length == expected


def test_a_version_is_read_if_there_is_one() -> None:
    assert parse_version(b'{"version":"0.32.0"}') == "0.32.0"
    assert parse_version(b"{}") is None
    assert parse_version(b"404") is None


def test_the_start_of_the_process_is_read() -> None:
    text = b"# TYPE process_start_time_seconds gauge\nprocess_start_time_seconds 1.7031234565e+09\n"
    assert parse_metrics(text, read_at=0.0).started_at == 1_703_123_456.5
    assert parse_metrics(b"process_start_time_seconds 0\n", read_at=0.0).started_at is None
    assert parse_metrics(b"", read_at=0.0).started_at is None
