"""`matrixinfer init` asks real engines, and what it writes starts a gateway."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from matrixinfer.config import load
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.server import SimEngine


async def matrixinfer(*arguments: str) -> tuple[int | None, str, str]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "matrixinfer", *arguments, stdout=pipe, stderr=pipe
    )
    out, error = await process.communicate()
    return process.returncode, out.decode(), error.decode()


async def test_what_is_written_names_the_engines_and_is_valid(tmp_path: Path, tokenizer: LocalTokenizer) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    here = SimEngineConfig(model=str(tmp_path / "model"), served_model_names=("m", "nice"), loras=("poet",))
    file = tmp_path / "gateway.yaml"
    async with SimEngine(here, tokenizer) as one, SimEngine(SimEngineConfig(flavor="sglang"), tokenizer) as two:
        code, _, error = await matrixinfer("init", f"{one.url}/v1", two.url, one.url, "-o", str(file))
        assert code == 0, error
    config, text = load(file), file.read_text()
    assert [(pod.name, pod.url) for pod in config.pods] == [
        (each.url.removeprefix("http://"), each.url) for each in (one, two)
    ]
    assert [(model.name, model.tokenizer) for model in config.models] == [("m", str(tmp_path / "model"))]
    for words in ("# vllm 0.32", "# sglang 0.5.23", "serves m, also as nice", "adapters: poet", "blocks of 16 tokens"):
        assert words in text, words


async def test_a_file_is_replaced_only_by_force(tmp_path: Path, tokenizer: LocalTokenizer) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("mine")
    async with SimEngine(SimEngineConfig(), tokenizer) as engine:
        code, _, error = await matrixinfer("init", engine.url, "-o", str(file))
        assert (code, file.read_text()) == (2, "mine")
        assert "use --force" in error
        code, _, error = await matrixinfer("init", engine.url, "-o", str(file), "--force")
        assert code == 0, error
    assert '#   - {name: "sim", tokenizer: /models/its-folder}' in file.read_text()
    code, out, error = await matrixinfer("config", "check", str(file))
    assert (code, out) == (0, f"{file}: valid (pods: 1, models: as the engines say)\n"), error


async def test_an_engine_that_does_not_answer_is_named(tmp_path: Path) -> None:
    code, out, error = await matrixinfer("init", "http://127.0.0.1:1", "-o", str(tmp_path / "x"))
    assert (code, out) == (2, "")
    assert "http://127.0.0.1:1/v1/models: Cannot connect" in error
    assert not (tmp_path / "x").exists()
