"""Where engines say that they publish, in the forms of vLLM and of SGLang."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from matrixinfer.pods.publishers import MAX_RANKS, KvSource, parse_kv_sources, parse_server_info

BLOCK: dict[str, Any] = {
    "publisher": "zmq",
    "endpoint_host": "*",
    "endpoint_port_base": 5557,
    "topic": "",
    "block_size": 16,
    "dp_size": 2,
    "replay_endpoint_port_base": 5657,
    "load_endpoint_port_base": 5559,
    "load_topic": "load",
}
INFO: dict[str, Any] = {"version": "0.5.23", "dp_size": 2, "tp_size": 1, "internal_states": [{}], "kv_events": BLOCK}


def listed(*ranks: int | None, named: bool = True) -> list[dict[str, object]]:
    """Entries of a list of sources, whose ports follow from the rank."""
    return [
        {"endpoint": f"tcp://*:{7000 + (rank or 0)}", "publisher": "zmq"}
        | ({"data_parallel_rank": rank} if named else {})
        for rank in ranks
    ]


def found(answer: object) -> dict[int | None, str]:
    return {source.rank: source.endpoint for source in parse_kv_sources(msgspec.json.encode(answer), host="h")}


def test_ranks_are_what_they_are_called_whatever_their_order_or_first_number() -> None:
    expected = {8: "tcp://h:7008", 9: "tcp://h:7009", 11: "tcp://h:7011"}
    assert found(listed(9, 11, 8)) == expected
    assert list(found(listed(9, 11, 8))) == [8, 9, 11]
    as_map = {str(entry["data_parallel_rank"]): entry for entry in listed(9, 11, 8)}
    assert found(as_map) == expected
    unnamed = {name: {"endpoint": entry["endpoint"]} for name, entry in as_map.items()}
    assert found(unnamed) == expected


def test_what_an_entry_says_of_itself_counts_more_than_its_key() -> None:
    assert found({"0": listed(1)[0], "1": listed(0)[0]}) == {0: "tcp://h:7000", 1: "tcp://h:7001"}


def test_one_publisher_needs_no_name() -> None:
    assert found(listed(0, named=False)) == {None: "tcp://h:7000"}
    assert found(listed(3)) == {3: "tcp://h:7003"}


@pytest.mark.parametrize("rank", [None, -1, True, "x", 1.5, 10**6])
def test_publishers_of_several_ranks_whose_rank_is_not_known_are_left_out(rank: object) -> None:
    odd = {"data_parallel_rank": rank, "endpoint": "tcp://h:1"}
    assert found([odd, *listed(0, 1)]) == {0: "tcp://h:7000", 1: "tcp://h:7001"}


def test_a_rank_that_two_publishers_claim_is_left_out() -> None:
    assert found([*listed(0, 1), {"data_parallel_rank": 1, "endpoint": "tcp://h:1"}]) == {0: "tcp://h:7000"}


def test_sglang_has_one_publisher_per_rank_from_the_base_ports_on() -> None:
    info = parse_server_info(msgspec.json.encode(INFO), host="10.0.0.7")
    assert info is not None
    assert (info.version, info.ranks) == ("0.5.23", 2)
    assert info.sources == tuple(
        KvSource(
            endpoint=f"tcp://10.0.0.7:{5557 + rank}",
            replay_endpoint=f"tcp://10.0.0.7:{5657 + rank}",
            rank=rank,
            load_endpoint=f"tcp://10.0.0.7:{5559 + rank}",
        )
        for rank in (0, 1)
    )


@pytest.mark.parametrize(
    ("host", "expected"),
    [("*", "[::1]"), ("0.0.0.0", "[::1]"), ("[::]", "[::1]"), ("10.1.1.1", "10.1.1.1"), ("[fd00::1]", "[fd00::1]")],
)
def test_only_wildcard_hosts_are_replaced(host: str, expected: str) -> None:
    block = {**BLOCK, "endpoint_host": host, "dp_size": 1}
    info = parse_server_info(msgspec.json.encode({**INFO, "kv_events": block}), host="::1")
    assert info is not None
    assert [source.endpoint for source in info.sources] == [f"tcp://{expected}:5557"]


def test_replay_and_load_are_optional() -> None:
    block = {name: value for name, value in BLOCK.items() if not name.startswith(("replay", "load"))}
    info = parse_server_info(msgspec.json.encode({**INFO, "kv_events": block}), host="h")
    assert info is not None
    assert info.sources[1] == KvSource(endpoint="tcp://h:5558", rank=1)


@pytest.mark.parametrize(
    "block",
    [
        None,
        5,
        {**BLOCK, "publisher": "null"},
        {**BLOCK, "endpoint_port_base": 0},
        {**BLOCK, "endpoint_port_base": "5557"},
        {**BLOCK, "endpoint_port_base": 70000},
    ],
)
def test_a_server_without_a_usable_publisher_is_still_sglang(block: object) -> None:
    info = parse_server_info(msgspec.json.encode({**INFO, "kv_events": block}), host="h")
    assert info is not None
    assert (info.sources, info.ranks) == ((), 2)


def test_the_number_of_ranks_is_bounded() -> None:
    block = {**BLOCK, "endpoint_port_base": 60000, "dp_size": 10**9}
    info = parse_server_info(msgspec.json.encode({**INFO, "kv_events": block}), host="h")
    assert info is not None
    assert len(info.sources) == MAX_RANKS
    past = {**BLOCK, "endpoint_port_base": 65535}
    info = parse_server_info(msgspec.json.encode({**INFO, "kv_events": past}), host="h")
    assert info is not None
    assert [source.rank for source in info.sources] == [0]


@pytest.mark.parametrize(
    ("attention", "endpoints"), [(True, ["tcp://h:5557", "tcp://h:5558"]), (False, ["tcp://h:5557"])]
)
def test_older_releases_have_the_option_only(attention: bool, endpoints: list[str]) -> None:
    config = {"publisher": "zmq", "endpoint": "tcp://*:5557", "topic": "kv"}
    old = {"version": "0.5.1", "dp_size": 2, "enable_dp_attention": attention, "kv_events_config": json.dumps(config)}
    info = parse_server_info(msgspec.json.encode(old), host="h")
    assert info is not None
    assert ([source.endpoint for source in info.sources], info.ranks) == (endpoints, 2)


@pytest.mark.parametrize(
    "config", [None, "", "{", "5", '{"publisher":"null"}', '{"publisher":"zmq","endpoint":"ipc:///x"}']
)
def test_older_releases_that_do_not_publish(config: str | None) -> None:
    info = parse_server_info(msgspec.json.encode({"version": "0.5.1", "kv_events_config": config}), host="h")
    assert info is not None
    assert info.sources == ()


@pytest.mark.parametrize("body", [b"", b"\xff", b"[]", b"{}", b'{"vllm_config":"..."}', b'{"version":"0.33.0"}'])
def test_an_answer_of_another_engine_is_not_sglang(body: bytes) -> None:
    assert parse_server_info(body, host="h") is None
