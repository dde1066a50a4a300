"""What the watch says of a release that differs from what is known."""

from __future__ import annotations

import pytest
from watch.compare import differences

from tests.unit.watch.support import ENGINE, EVENTS, KINDS, METRICS, MadeSources


def said(path: str, text: str | None) -> str:
    """The only difference, when a file has another text."""
    (sentence,) = differences(ENGINE, MadeSources({path: text}))
    return sentence


def events(old: str, new: str) -> str:
    assert old in EVENTS
    return said("made/events.py", EVENTS.replace(old, new, 1))


def test_a_release_that_is_known_differs_in_nothing() -> None:
    assert differences(ENGINE, MadeSources()) == []


def test_a_new_field() -> None:
    assert events("session_id: str | None", "tenant: str | None = None\n    session_id: str | None") == (
        "Made: BlockStored has a new field `tenant`. Read in made/events.py what it means. Does the content of a block, or "
        "where it is, depend on it? Then read it in src/matrixinfer/kvevents/wire.py; if not, say why in watch/known.py"
    )


def test_a_new_field_in_a_base_class() -> None:
    assert (
        "BlockStored has a new field `node`"
        in differences(
            ENGINE, MadeSources({"made/events.py": EVENTS.replace('"""The base."""', "node: str | None = None")})
        )[0]
    )


def test_a_field_that_is_gone() -> None:
    assert events("    lora_name: str | None = None\n", "") == (
        "Made: BlockStored has no field `lora_name` any more. Find out what replaces it in made/events.py, then change "
        "src/matrixinfer/kvevents/wire.py and watch/known.py"
    )


def test_a_new_event() -> None:
    new = EVENTS.replace(
        "class AllBlocksCleared", "class BlockMoved(KVCacheEvent):\n    pass\n\n\nclass AllBlocksCleared"
    )
    assert said("made/events.py", new.replace("BlockStored | Block", "BlockStored | BlockMoved | Block")).startswith(
        "Made: a batch may hold the new event BlockMoved. Read in made/events.py what it means"
    )


def test_an_event_that_is_gone() -> None:
    text = EVENTS.replace("class BlockRemoved", "class BlocksRemoved").replace("| BlockRemoved |", "|")
    assert said("made/events.py", text) == (
        "Made: made/events.py has no class BlockRemoved any more. Find what took its place, then change "
        "src/matrixinfer/kvevents/wire.py and watch/known.py"
    )


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            "omit_defaults=True, tag=True",
            "omit_defaults=True, tag=True, tag_field='kind'",
            "3 of 3 kinds of events cannot be read",
        ),
        ("omit_defaults=True, tag=True", "omit_defaults=True", "3 of 3 kinds of events cannot be read"),
        ("array_like=True, omit_defaults", "omit_defaults", None),
        ("omit_defaults=True, tag=True", "array_like=True, tag=True", None),
        ("data_parallel_rank: int", "rank: int", "KVEventBatch has a new field `rank`"),
    ],
    ids=["another tag field", "no tag", "a map batch", "array events", "another name for the rank"],
)
def test_layouts(old: str, new: str, sentence: str | None) -> None:
    found = differences(ENGINE, MadeSources({"made/events.py": EVENTS.replace(old, new, 1)}))
    assert not found if sentence is None else any(sentence in each for each in found)


def test_fields_of_an_array_that_change_places() -> None:
    text = EVENTS.replace("omit_defaults=True, tag=True", "array_like=True, tag=True")
    swapped = text.replace(
        "    block_size: int\n    lora_id: int | None\n", "    lora_id: int | None\n    block_size: int\n"
    )
    found = differences(ENGINE, MadeSources({"made/events.py": swapped}))
    assert any("`block_size` of BlockStored is not read where the release puts it" in each for each in found)


def test_a_new_kind_of_attention() -> None:
    assert said("made/kinds.py", KINDS + '    LINEAR = "linear"\n') == (
        "Made: there is a new kind of attention, `linear`. Read in made/kinds.py what it means, then give it a rule in "
        "src/matrixinfer/kvevents/groups.py; if it needs none, say why in watch/known.py"
    )


def test_a_kind_of_attention_that_is_gone() -> None:
    assert "the kind of attention `other` is gone from made/kinds.py" in said(
        "made/kinds.py", KINDS.replace('    OTHER = "other"\n', "")
    )


def test_an_enumeration_that_is_gone() -> None:
    assert said("made/kinds.py", "") == (
        "Made: made/kinds.py has no Kind any more. Find where each kind of attention is named now, and change "
        "watch/known.py"
    )


def test_a_new_medium() -> None:
    assert "there is a new medium, `TAPE`" in events('MEDIUM_CPU = "CPU"', 'MEDIUM_CPU = "CPU"\nMEDIUM_TAPE = "TAPE"')


def test_messages_with_another_number_of_parts() -> None:
    assert events('(client, b"", topic, seq, payload)', '(client, b"", seq, payload)') == (
        "Made: messages have 3 or 4 parts, and 3 or 5 were expected. Compare how live and replayed frames are sent with "
        "src/matrixinfer/kvevents/replay.py"
    )


def test_a_metric_that_is_gone() -> None:
    assert said("made/metrics.py", METRICS.replace("running", "active")) == (
        "Made: `made:running` is not in made/metrics.py any more, and the gateway looks for it over HTTP. Find its new "
        "name, read that too in src/matrixinfer/pods, and change watch/known.py"
    )


def test_a_file_that_is_gone_hides_no_other_difference() -> None:
    found = differences(ENGINE, MadeSources({"made/events.py": None, "made/metrics.py": "x = ("}))
    gone = "Made: there is no made/events.py any more. Find where its content went, and change watch/known.py"
    assert found[:2] == [gone, gone]  # its events and its media
    assert found[2].startswith("Made: made/metrics.py cannot be parsed: ")
    assert len(found) == 3
