"""A Hugging Face cache with the tokenizer that the simulated engines use."""

from __future__ import annotations

import shutil
from pathlib import Path

from matrixinfer.prompt.chat_template import CHATML

from .fleet import TOKENIZER

REPO = "river/long-8b"
OTHER_CHATML = CHATML.replace("{%- if tools %}", "You are a river.{%- if tools %}")


def model_folder(path: Path, *, template: str = CHATML) -> Path:
    """Write a model's folder: vocabulary and chat template, without weights."""
    path.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, path / name)
    (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    return path


def cached(cache: Path, *, revision: str = "abc123", main: str | None = "abc123", template: str = CHATML) -> Path:
    """Put a revision of the repository into a cache. Returns its folder."""
    repository = cache / f"models--{REPO.replace('/', '--')}"
    if main is not None:
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(main, encoding="utf-8")
    return model_folder(repository / "snapshots" / revision, template=template)
