"""`matrixinfer events record`: raw frames of engines' feeds into a capture."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path
from typing import Any

from matrixinfer import __version__
from matrixinfer.cli.arguments import Subparsers
from matrixinfer.cli.events.sources import add_arguments, address, sources, until_told
from matrixinfer.config import KvEventsConfig
from matrixinfer.feedtools.capture_file import CaptureWriter
from matrixinfer.feedtools.describe import plural
from matrixinfer.feedtools.listen import Frame, Listener, Note, Stray

FLUSH_SECONDS = 1.0
"""What a killed recording may lack."""


def add_parser(commands: Subparsers) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "record",
        help="record what engines publish, for `events check`",
        description="Record the raw KV event frames of one or more publishers until Ctrl-C. "
        "A recording holds token ids, and so the prompts: treat it as you treat them.",
    )
    parser.add_argument(
        "endpoints",
        nargs="+",
        type=address,
        metavar="ENDPOINT",
        help="where an engine publishes, such as tcp://10.0.0.1:5557; or its HTTP URL: every rank that its "
        "/kv_event_sources names is recorded, history first",
    )
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="FILE", help="the capture; gzipped if it ends in .gz"
    )
    add_arguments(parser, unit="frames")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Record until told to stop."""
    asyncio.run(record(args))
    return 0


async def record(args: argparse.Namespace) -> None:
    """Write what comes. Raises `ConfigError`, `CannotListen` and `CaptureFileError`."""
    found = await sources(args.endpoints, args.replay)
    with CaptureWriter(args.output) as capture:
        recorder = _Recorder(capture, found, topic=args.topic, count=args.count)
        try:
            async with until_told(args.seconds):
                await recorder.record()
        finally:
            recorder.say_progress(end="\n")


class _Recorder:
    def __init__(
        self, capture: CaptureWriter, sources: list[KvEventsConfig], *, topic: str | None, count: int | None
    ) -> None:
        self._capture = capture
        self._sources = sources
        self._topic = None if topic is None else topic.encode()
        self._count = count
        self._frames = 0
        self._left_out = 0
        self._flushed = time.monotonic()

    async def record(self) -> None:
        """Write what comes until enough has."""
        self._capture.write(self._meta())
        async with Listener(self._sources) as listener:
            while self._count is None or self._frames < self._count:
                news = await listener.next(FLUSH_SECONDS)
                if isinstance(news, Note):
                    print(f"{news.publisher}: {news.words}", file=sys.stderr, flush=True)
                elif isinstance(news, Frame):
                    self._take(news)
                elif isinstance(news, Stray):
                    self._left_out += 1
                if time.monotonic() >= self._flushed + FLUSH_SECONDS:
                    self._capture.flush()
                    self.say_progress()
                    self._flushed = time.monotonic()

    def say_progress(self, end: str = "\r") -> None:
        """How much there is, on standard error: over and over in one line of a terminal, else once."""
        if end == "\n" or sys.stderr.isatty():
            left_out = f", {plural(self._left_out, 'message')} left out" if self._left_out else ""
            size = f"{self._capture.size:,} bytes"
            print(f"{plural(self._frames, 'frame')}, {size}{left_out}", file=sys.stderr, end=end, flush=True)

    def _take(self, frame: Frame) -> None:
        if self._topic is not None and frame.topic not in (None, self._topic):
            self._left_out += 1
            return
        row: dict[str, Any] = {"kind": "event", "t": time.time()}
        if len(self._sources) > 1:
            row["port"] = frame.publisher
        if frame.topic is None:
            row["replayed"] = True
        else:
            row["topic"] = frame.topic.decode("utf-8", "replace")
        self._capture.write({**row, "seq": frame.seq, "payload_hex": frame.payload.hex()})
        self._frames += 1

    def _meta(self) -> dict[str, Any]:
        publishers = [{"endpoint": source.endpoint, "replay": source.replay_endpoint} for source in self._sources]
        return {"kind": "meta", "t": time.time(), "recorder": f"matrixinfer {__version__}", "publishers": publishers}
