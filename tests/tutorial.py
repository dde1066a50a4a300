"""Runs the commands of the tutorial, as somebody who types them into one terminal."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.ports import free_port

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
_MARK = "=== next block ==="
_PAUSE_SECONDS = 4
"""Between two blocks, and for each pause on the page: people are slower than this, and busy machines slower than people."""


@dataclass(frozen=True)
class Block:
    """Commands, and what the page says that they print."""

    commands: str
    shown: str | None


def blocks(title: str) -> list[Block]:
    """The blocks of a section, in order."""
    page = PAGE.read_text()
    start = page.index(f"\n## {title}\n")
    end = page.find("\n## ", start + 1)
    found = re.findall(r"```sh\n(.*?)```(?:\s+```text\n(.*?)```)?", page[start:end], flags=re.DOTALL)
    return [Block(commands, shown or None) for commands, shown in found]


@dataclass(frozen=True)
class Ports:
    """Free ports in place of those that the page names."""

    by_name: Mapping[str, int]

    @classmethod
    def of(cls, found: list[Block]) -> Ports:
        names = sorted(
            set(re.findall(r"\b(?:80|55)\d\d\b", " ".join(each.commands for each in found))) | {"8080", "8081"}
        )
        return cls({name: free_port() for name in names})

    def put(self, commands: str) -> str:
        """The commands with these ports, also where the page leaves them to the defaults."""
        api, admin = self.by_name["8080"], self.by_name["8081"]
        for name, port in self.by_name.items():
            commands = re.sub(rf"\b{name}\b", str(port), commands)
        commands = commands.replace("matrixinfer serve", f"matrixinfer serve --port {api} --admin 127.0.0.1:{admin}")
        return commands.replace("matrixinfer explain", f"matrixinfer explain --admin http://127.0.0.1:{admin}")

    def names(self, output: str) -> str:
        """An output as the page would show it."""
        for name, port in self.by_name.items():
            output = re.sub(rf"\b{port}\b", name, output)
        return output


def play(
    commands: list[str], folder: Path, *, seconds: float, environment: Mapping[str, str] | None = None
) -> list[str]:
    """What each block prints. Raises `AssertionError` if one fails, or if all of them take longer than `seconds`."""
    script = f"set -e\nsleep() {{ command sleep {_PAUSE_SECONDS}; }}\n" + f"\nsleep\necho '{_MARK}'\n".join(commands)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    output = folder / "output.txt"
    with output.open("wb") as out:
        shell = subprocess.Popen(
            ["bash", "-c", script],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {}), "PATH": path, "COLUMNS": "200"},
            start_new_session=True,
        )
        try:
            code = shell.wait(seconds)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            _end(shell)
    text = output.read_text()
    logs = "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in folder.glob("*.log"))
    assert code == 0, f"ended with {code} after:\n{text}\n{logs}"
    return [each.strip("\n") for each in text.split(_MARK)]


def _end(shell: subprocess.Popen[bytes]) -> None:
    """End the shell and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(shell.pid, signal.SIGKILL)
    shell.wait()
