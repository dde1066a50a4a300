"""Runs `matrixinfer doctor` for the page, in a process of its own: it reads tokenizers and listens to every engine."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from matrixinfer.config import Config
from matrixinfer.errors import MatrixInferError

DEADLINE_SECONDS = 300.0
_KILL_SECONDS = 5.0
COMMAND = (sys.executable, "-m", "matrixinfer", "doctor", "--json", "--config", "/dev/stdin")


class ExaminationFailed(MatrixInferError):
    """The doctor could not be run, or found no end."""


class Examination:
    """Examines the engines of `config`, as it is now. One examination runs at a time."""

    def __init__(
        self,
        config: Callable[[], Config],
        *,
        command: Sequence[str] = COMMAND,
        deadline: float = DEADLINE_SECONDS,
    ) -> None:
        self._config = config
        self._command = command
        self._deadline = deadline
        self._is_running = False

    async def run(self) -> Mapping[str, Any]:
        """The findings and their summary, as `matrixinfer doctor --json` prints them. Raises `ExaminationFailed`."""
        if self._is_running:
            raise ExaminationFailed("The engines are being examined already. Wait until that has ended.")
        config = self._config()
        if not config.pods:
            raise ExaminationFailed("There is no pod to examine.")
        self._is_running = True
        try:
            return await self._examine(config)
        except OSError as error:
            raise ExaminationFailed(f"The doctor cannot be started: {error.strerror}.") from error
        finally:
            self._is_running = False

    async def _examine(self, config: Config) -> Mapping[str, Any]:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe, stderr=pipe)
        try:
            async with asyncio.timeout(self._deadline):
                said, complaint = await process.communicate(msgspec.json.encode(config))
        except TimeoutError as error:
            raise ExaminationFailed(f"The doctor has not ended within {self._deadline:g} s.") from error
        finally:
            if process.returncode is None:
                process.kill()
                async with asyncio.timeout(_KILL_SECONDS):
                    await process.wait()
        try:
            answer: Mapping[str, Any] = json.loads(said)
        except ValueError as error:
            lines = complaint.decode(errors="replace").strip().splitlines()
            raise ExaminationFailed(f"The doctor failed: {lines[-1] if lines else process.returncode}") from error
        return answer
