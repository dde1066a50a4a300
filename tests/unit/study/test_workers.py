"""Processes that end with the one that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

_STARTS_ONE = """
import os, sys, time
from matrixinfer.study.workers import workers

if __name__ == "__main__":
    with workers(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600)
        time.sleep(600)
"""


@pytest.mark.parametrize("ends_by", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_a_process_that_is_killed(tmp_path: Path, ends_by: signal.Signals) -> None:
    script = tmp_path / "starts_one.py"
    script.write_text(_STARTS_ONE)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        worker = int(starter.stdout.readline())
        os.kill(worker, 0)  # it is there
        starter.send_signal(ends_by)
        assert starter.stdout.read() == ""  # it ends when the last process that holds the pipe has ended
