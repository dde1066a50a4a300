"""`matrixinfer events record`: records the raw KV event frames of engines in a capture file."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path
from typing import Any

from matrixinfer import __version__
from matrixinfer.cli.arguments import Subparsers, engine_key
from matrixinfer.cli.events.sources import add_arguments, address, sources, until_stopped
from matrixinfer.config import KvEventsConfig
from matrixinfer.errors import ConfigError
from matrixinfer.feedtools.capture_file import CaptureWriter
from matrixinfer.feedtools.describe import plural
from matrixinfer.feedtools.listen import Frame, Listener, Note, Stray

FLUSH_SECONDS = 1.0
"""A recording that is killed loses at most the frames of this long."""


def add_parser(commands: Subparsers) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "record",
        help="record what engines publish, for `events check`",
        description="Record the raw KV event frames of one or more publishers until Ctrl-C. "
        "A recording contains token ids, and so the text of prompts: protect it as you protect prompts.",
    )
    parser.add_argument(
        "endpoints",
        nargs="+",
        type=address,
        metavar="ENDPOINT",
        help="where an engine publishes, such as tcp://10.0.0.1:5557. Or the engine's HTTP URL: then every rank in its "
        "/kv_event_sources is recorded, past events first",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="the capture file; gzipped if its name ends in .gz",
    )
    parser.add_argument("--force", action="store_true", help="overwrite the file if it exists")
    add_arguments(parser, unit="frames")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Record until a limit is reached or a signal arrives."""
    asyncio.run(record(args))
    return 0


async def record(args: argparse.Namespace) -> None:
    """Record to the file. Raises `ConfigError`, `CannotListen` or `CaptureFileError`."""
    if args.output.is_file() and not args.force:
        raise ConfigError("--output", f"{args.output} exists: name another file, or add --force to overwrite it")
    found = await sources(args.endpoints, args.replay, engine_key(args))
    with CaptureWriter(args.output) as capture:
        recorder = _Recorder(capture, found, topic=args.topic, count=args.count)
        try:
            async with until_stopped(args.seconds):
                await recorder.record()
        finally:
            recorder.print_progress(end="\n")


class _Recorder:
    def __init__(
        self, capture: CaptureWriter, sources: list[KvEventsConfig], *, topic: str | None, count: int | None
    ) -> None:
        self._capture = capture
        self._sources = sources
        self._topic = None if topic is None else topic.encode()
        self._count = count
        self._frames = 0
        self._skipped = 0
        self._flushed = time.monotonic()

    async def record(self) -> None:
        """Write frames until there are `count`."""
        self._capture.write(self._meta())
        async with Listener(self._sources) as listener:
            while self._count is None or self._frames < self._count:
                news = await listener.next(FLUSH_SECONDS)
                if isinstance(news, Note):
                    print(f"{news.publisher}: {news.words}", file=sys.stderr, flush=True)
                elif isinstance(news, Frame):
                    self._take(news)
                elif isinstance(news, Stray):
                    self._skipped += 1
                if time.monotonic() >= self._flushed + FLUSH_SECONDS:
                    self._capture.flush()
                    self.print_progress()
                    self._flushed = time.monotonic()

    def print_progress(self, end: str = "\r") -> None:
        """Print the totals to standard error: on a terminal in one line that is overwritten, otherwise at the end only."""
        if end == "\n" or sys.stderr.isatty():
            skipped = f", {plural(self._skipped, 'message')} skipped" if self._skipped else ""
            size = f"{self._capture.size:,} bytes"
            print(f"{plural(self._frames, 'frame')}, {size}{skipped}", file=sys.stderr, end=end, flush=True)

    def _take(self, frame: Frame) -> None:
        if self._topic is not None and frame.topic not in (None, self._topic):
            self._skipped += 1
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
