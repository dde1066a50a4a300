"""What the watch takes for known is what the gateway reads, and what docs/engines.md says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from watch.known import ENGINES, Engine
from watch.report import BEGIN, END, Result, known_names, section, written
from watch.sources import CannotRead

from matrixinfer.kvevents.groups import kind_of
from matrixinfer.kvevents.wire import BlockRemoved, BlockStored

ROOT = Path(__file__).parents[3]
UNWATCHED = {"mm_keys"}
"""Fields of TensorRT-LLM alone, whose releases are not watched."""
STRUCTS: dict[str, type[msgspec.Struct]] = {"BlockStored": BlockStored, "BlockRemoved": BlockRemoved}


@pytest.mark.parametrize("name", STRUCTS)
def test_the_fields_that_are_read_are_those_of_the_decoder(name: str) -> None:
    read = {field for engine in ENGINES for field in engine.structs[name].read}
    assert read == {field.name for field in msgspec.structs.fields(STRUCTS[name])} - UNWATCHED


@pytest.mark.parametrize("engine", [each for each in ENGINES if each.kinds], ids=lambda engine: engine.title)
def test_every_kind_of_attention_has_a_rule_or_a_reason(engine: Engine) -> None:
    def has_rule(kind: str) -> bool:
        stored = BlockStored(block_hashes=[], token_ids=msgspec.Raw(b"\x90"), block_size=16, kv_cache_spec_kind=kind)
        return kind_of(stored) is not None

    assert engine.kinds is not None
    assert all(map(has_rule, engine.kinds.read))
    assert not any(map(has_rule, engine.kinds.unread))


def test_paths_and_metrics_are_those_that_the_gateway_reads() -> None:
    code = "".join(file.read_text() for file in (ROOT / "src" / "matrixinfer").rglob("*.py"))
    words = {word for engine in ENGINES for words in engine.strings.values() for word in words}
    assert {word for word in words if word[0] == "/" or ":" in word if word.lstrip("/") not in code} == set()


def test_the_page_says_what_is_known() -> None:
    page = (ROOT / "docs" / "engines.md").read_text()
    kept = page.partition(BEGIN)[2].partition(END)[0]
    assert kept.strip().splitlines()[-len(list(known_names())) :] == list(known_names()), "run: make check-engines"
    assert all(f"| {engine.title} | " in kept for engine in ENGINES)


def test_a_result_replaces_the_one_before() -> None:
    results = {engine.package: Result("9.9", "2030-01-01") for engine in ENGINES}
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert written(page, results) == f"before\n{BEGIN}\n{section(results)}\n{END}\nafter\n"
    assert "| vLLM | 9.9 | 2030-01-01 | nothing that the gateway does not know |" in section(results)


def test_a_page_without_the_marks_is_refused() -> None:
    with pytest.raises(CannotRead, match="lacks the lines"):
        written("a page", {engine.package: Result("9.9", "2030-01-01") for engine in ENGINES})
