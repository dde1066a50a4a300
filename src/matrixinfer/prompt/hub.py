"""Downloads a model's tokenizer and template files from the Hugging Face Hub, never weights.

The download runs in a process of its own, so that its deadline holds whatever the network does.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from importlib.util import find_spec
from pathlib import Path

from matrixinfer.errors import TokenizeError

FILES = (
    "*.tiktoken",
    "additional_chat_templates/*.jinja",
    "chat_template.jinja",
    "config.json",
    "special_tokens_map.json",
    "tekken.json",
    "tiktoken.model",
    "tokenization_*.py",
    "tokenizer.json",
    "tokenizer.model*",
    "tokenizer_config.json",
)
"""Patterns of the files that are downloaded. The Python file is read as text, never run."""
_MAX_SAID = 300


def can_download() -> bool:
    """Whether `huggingface_hub` is installed."""
    return find_spec("huggingface_hub") is not None


async def download(repo: str, revision: str | None, *, timeout_seconds: float) -> Path:
    """Download into Hugging Face's cache and return the folder. Raises `TokenizeError`."""
    arguments = [sys.executable, "-m", "matrixinfer.prompt.hub", repo]
    process = await asyncio.create_subprocess_exec(
        *arguments,
        *(() if revision is None else ("--revision", revision)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(timeout_seconds):
            out, err = await process.communicate()
    except TimeoutError as error:
        raise TokenizeError(f"{repo} could not be downloaded within {timeout_seconds:g} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        said = err.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
        raise TokenizeError(f"{repo} could not be downloaded: {said[-1][:_MAX_SAID]}")
    return Path(out.decode().strip())


def main() -> int:
    """Download one repository and print its folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("repo")
    parser.add_argument("--revision")
    args = parser.parse_args()
    import huggingface_hub  # noqa: PLC0415 - an extra

    try:
        folder = huggingface_hub.snapshot_download(args.repo, revision=args.revision, allow_patterns=list(FILES))
    except Exception as error:  # noqa: BLE001 - boundary: the process reports any failure in one line
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
