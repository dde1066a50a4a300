"""Reports to systemd what the process does (`Type=notify`): ready, reloading, stopping, alive. Without systemd it does nothing."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Mapping
from contextlib import suppress

MIN_WATCHDOG_SECONDS = 0.05


class Notifier:
    """Sends to the socket that the environment names. What cannot be sent is left out: it must not end the process."""

    def __init__(self, environment: Mapping[str, str], process: int) -> None:
        path = environment.get("NOTIFY_SOCKET", "")
        self._address = f"\0{path[1:]}" if path.startswith("@") else path
        microseconds = environment.get("WATCHDOG_USEC", "")
        is_mine = environment.get("WATCHDOG_PID", str(process)) == str(process)
        self._watchdog_seconds = int(microseconds) / 1e6 if microseconds.isdecimal() and is_mine else 0.0

    def ready(self) -> None:
        """The process serves; or it does again, after `reloading`."""
        self._send("READY=1")

    def reloading(self) -> None:
        """The configuration is being read again."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """The process drains, and then ends."""
        self._send("STOPPING=1")

    async def watch(self) -> None:
        """Say that the event loop runs, twice as often as systemd wants it. Runs until it is cancelled."""
        if not self._address or not self._watchdog_seconds:
            return
        while True:
            self._send("WATCHDOG=1")
            await asyncio.sleep(max(MIN_WATCHDOG_SECONDS, self._watchdog_seconds / 2))

    def _send(self, message: str) -> None:
        if not self._address:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.setblocking(False)
            sender.sendto(message.encode(), self._address)
