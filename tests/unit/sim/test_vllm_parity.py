"""The cache and the wire format, compared with recordings of vLLM 0.32."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

import msgspec
import pytest

from matrixinfer.sim.events import EventBatch, encode

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
