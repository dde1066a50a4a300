"""Images, audio and video as the simulated engine takes them, compared with recordings of vLLM's own cache code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from matrixinfer.errors import InvalidRequest
from matrixinfer.feedtools.capture_file import CaptureReader
from matrixinfer.sim.attention import Group
from matrixinfer.sim.media import MediaReader, MediumRun
from matrixinfer.sim.prefix_cache import Adapter
from matrixinfer.sim.sequence import Sequence

CAPTURES = Path(__file__).parents[2] / "data" / "captures"
SIZE, PLACEHOLDER = 16, 900
Row = dict[str, Any]
Chain = tuple[tuple[list[int], Any], ...]
"""Tokens and extra keys of a block and of all before it."""


def rows(name: str) -> list[Row]:
    return list(CaptureReader(CAPTURES / f"{name}.jsonl.gz"))


def recorded(rows: list[Row]) -> dict[int, Chain]:
    """The blocks that the recorded engine stored in its group of full attention, by hash."""
    paths: dict[int, Chain] = {}
    for row in rows:
        batch = msgspec.msgpack.decode(bytes.fromhex(row["payload_hex"])) if row["kind"] == "event" else (0, [])
        for event in batch[1]:
            if event["type"] == "BlockStored" and event["group_idx"] == 0:
                before = paths.get(event["parent_block_hash"], ())
                for number, block in enumerate(event["block_hashes"]):
                    tokens = event["token_ids"][number * SIZE : (number + 1) * SIZE]
                    before = (*before, (tokens, event["extra_keys"] and event["extra_keys"][number]))
                    paths[block] = before
    return paths


def simulated(rows: list[Row], lookahead: int) -> dict[int, Chain]:
    """The same of the prompts in the simulated engine."""
    paths: dict[int, Chain] = {}
    for row in rows:
        if row["kind"] != "request":
            continue
        body = row["body"]
        sequence = Sequence(
            np.array(row["prompt_token_ids"], dtype=np.uint32),
            SIZE,
            body.get("cache_salt"),
            Adapter(1, body["model"]) if body["model"] != "base" else None,
            lookahead=lookahead,
            media=[
                MediumRun(each["offset"], each["length"], each["identifier"]) for each in row.get("mm_features", ())
            ],
        )
        if sequence.hashes:
            event = sequence.stored_event(0, len(sequence.hashes), Group(block_size=SIZE))
            assert isinstance(event.extra_keys, list)
            before: Chain = ()
            for number, block in enumerate(sequence.hashes):
                before = (*before, (event.token_ids[number * SIZE : (number + 1) * SIZE], event.extra_keys[number]))
                paths[block] = before
    return paths


def written(paths: dict[int, Chain]) -> dict[bytes, bytes]:
    """Chains with their keys, and the tokens of each."""
    return {
        msgspec.json.encode(chain): msgspec.json.encode([tokens for tokens, _ in chain]) for chain in paths.values()
    }


@pytest.mark.parametrize(
    ("name", "lookahead"),
    [("oracle-media-full-bs16", 0), ("oracle-v033-media-lookahead1-full-swa-bs16", 1)],
)
def test_blocks_have_the_keys_that_vllm_gives_them_and_names_of_their_own(name: str, lookahead: int) -> None:
    found = rows(name)
    ours, theirs = simulated(found, lookahead), written(recorded(found))
    known = written(ours)
    stored = {chain for chain, tokens in known.items() if tokens in theirs.values()}  # all but those of aborted prompts
    assert stored <= theirs.keys()
    assert len(stored) > 0.98 * len(known)
    assert sum(b"img" in chain for chain in stored) > 100
    if not lookahead:  # or what follows a block is part of its name as well
        assert len(known) == len(ours)


def chat(*parts: Row) -> list[Row]:
    return [{"role": "user", "content": list(parts)}]


def image(data: str | None, **more: Any) -> Row:
    return {"type": "image_url", "image_url": data and {"url": data}, **more}


@pytest.fixture
def reader() -> MediaReader:
    return MediaReader(np.array([PLACEHOLDER], dtype=np.uint32))


def ids(*tokens: int) -> Any:
    return np.array(tokens, dtype=np.uint32)


def test_each_medium_becomes_a_run_of_placeholders_named_by_uuid_or_content(reader: MediaReader) -> None:
    messages = chat(image("data:" + "a" * 155), {"type": "text", "text": "and"}, image("data:b", uuid="b"))
    tokens, media = reader.read(messages, ids(1, PLACEHOLDER, 2, PLACEHOLDER, 3))
    assert [(each.start, each.length) for each in media] == [(1, 26), (28, 16)]
    assert tokens.tolist() == [1, *[PLACEHOLDER] * 26, 2, *[PLACEHOLDER] * 16, 3]
    assert media[1].name == "b"
    _, again = reader.read(messages, ids(PLACEHOLDER, PLACEHOLDER), None)
    assert [each.name for each in again] == [each.name for each in media]
    _, other = reader.read(messages, ids(PLACEHOLDER, PLACEHOLDER), {"max_pixels": 1})
    assert not {each.name for each in other} & {each.name for each in media}


def test_a_uuid_that_is_known_needs_no_content(reader: MediaReader) -> None:
    with pytest.raises(InvalidRequest, match="uuid"):
        reader.read(chat(image(None, uuid="b")), ids(PLACEHOLDER))
    first, _ = reader.read(chat(image("data:" + "a" * 1000, uuid="b")), ids(PLACEHOLDER))
    again, _ = reader.read(chat(image(None, uuid="b")), ids(PLACEHOLDER))
    assert again.tolist() == first.tolist()


def test_what_does_not_fit_is_refused(reader: MediaReader) -> None:
    with pytest.raises(InvalidRequest, match="expected 1 media placeholders in the prompt, found 2"):
        reader.read(chat(image("data:a")), ids(PLACEHOLDER, PLACEHOLDER))
    with pytest.raises(ValueError, match="one token"):
        MediaReader(ids(1, 2))
