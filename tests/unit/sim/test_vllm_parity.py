"""The cache and the wire format, compared with recordings of vLLM."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import TypedDict

import msgspec
import pytest

from matrixinfer.sim.attention import Group, Layout
from matrixinfer.sim.cache import PagedPrefixCache
from matrixinfer.sim.events import EventBatch, encode

from . import drive_groups
from .drive import digest, drive


class _Run(TypedDict):
    block_size: int
    num_blocks: int
    seed: int
    steps: int
    hit_blocks: list[int]
    batches: int
    events_sha256: str


class _Recording(TypedDict):
    source: str
    frames: dict[str, str]
    runs: list[_Run]


class _GroupsRun(TypedDict):
    version: str
    attention: list[str]
    block_size: int
    num_blocks: int
    drop: bool
    lookahead: int
    dense: bool
    seed: int
    steps: int
    lookups: int
    hit_tokens: int
    hits_sha256: str
    batches: int
    events_sha256: str


class _Groups(TypedDict):
    source: str
    runs: list[_GroupsRun]


GROUPS = msgspec.json.decode(Path(__file__).with_name("vllm_groups.json").read_bytes(), type=_Groups)
RECORDING = msgspec.json.decode(Path(__file__).with_name("vllm_0_32.json").read_bytes(), type=_Recording)


@pytest.mark.parametrize("run", RECORDING["runs"], ids=lambda run: f"block-{run['block_size']}")
def test_every_hit_and_every_event_equals_vllms(run: _Run) -> None:
    hits, batches = drive(
        block_size=run["block_size"], num_blocks=run["num_blocks"], seed=run["seed"], steps=run["steps"]
    )
    assert [hit // run["block_size"] for hit in hits] == run["hit_blocks"]
    assert len(batches) == run["batches"]
    assert digest(batches) == run["events_sha256"]


@pytest.mark.parametrize("name", RECORDING["frames"])
def test_a_batch_is_encoded_byte_for_byte_as_vllm_does(name: str) -> None:
    frame = bytes.fromhex(RECORDING["frames"][name])
    assert encode(msgspec.msgpack.decode(frame, type=EventBatch)) == frame


def _name(run: _GroupsRun) -> str:
    modes = {"drop": run["drop"], "lookahead": run["lookahead"], "dense": run["dense"]}
    return "-".join([run["version"], *run["attention"], *(name for name, on in modes.items() if on)])


@pytest.mark.parametrize("run", GROUPS["runs"], ids=_name)
def test_every_hit_and_every_event_of_attention_groups_equals_vllms(run: _GroupsRun) -> None:
    size = run["block_size"]
    layout = Layout(
        groups=tuple(Group.parse(text, size) for text in run["attention"]),
        drop=run["drop"],
        lookahead=run["lookahead"],
        dense=run["dense"],
    )
    manager = drive_groups.SimManager(PagedPrefixCache(run["num_blocks"], size, layout=layout))
    hits, batches = drive_groups.drive(manager, seed=run["seed"], steps=run["steps"], unit=layout.unit)
    assert (len(hits), sum(hits), len(batches)) == (run["lookups"], run["hit_tokens"], run["batches"])
    assert sha256(json.dumps(hits).encode()).hexdigest() == run["hits_sha256"]
    assert digest(batches) == run["events_sha256"]
