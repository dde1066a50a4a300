"""The part of the tutorial on two real engines, with a model that is smaller than the page's."""

from __future__ import annotations

import re
from pathlib import Path

from tests.tutorial import Ports, blocks, play

from .engine import START_SECONDS, Engine, Options
from .install import executable
from .model import tokenizer_of

NAME = "Qwen/Qwen3-0.6B"


def whole(model: Path, folder: Path) -> Path:
    """A folder with the model and its tokenizer beside it, as published models have it."""
    folder.mkdir()
    for file in (*model.iterdir(), *tokenizer_of(model).iterdir()):
        (folder / file.name).symlink_to(file)
    return folder


def test_every_block_on_real_engines_works_and_the_second_chat_is_a_hit(
    tmp_path: Path, folder: Path, version: str, model: Path
) -> None:
    model = whole(model, tmp_path / "model")
    found = blocks("Two real engines")
    ports = Ports.of(found)
    engine = Engine(executable=executable(folder, version), model=model, options=Options(), folder=folder, core=0)
    small = engine.command(NAME)
    commands = [ports.put(each.commands).replace(f"vllm serve {NAME}", small) for each in found]
    assert sum(each.count(small) for each in commands) == 2
    printed = play(commands, tmp_path, seconds=2 * START_SECONDS, environment=engine.environment())
    assert "2 pods: no problems found" in "\n".join(printed)
    rows = re.findall(r"(turn-\d) +\S+ +(\d+) +(\S+) +(\S+) +(\d+) +(\d+) +200", ports.names("\n".join(printed)))
    (second, tokens, pod, trust, predicted, cached), (first, _, before, _, nothing, _) = rows
    assert (first, second) == ("turn-1", "turn-2")
    assert (pod, trust, nothing) == (before, "exact", "0")
    assert int(tokens) - Options().block_size <= int(predicted) == int(cached) < int(tokens)
