"""`matrixinfer events tail`: shows the KV events of an engine live, in plain words."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict

from matrixinfer.cli.arguments import Subparsers, engine_key
from matrixinfer.cli.events.sources import add_arguments, address, sources, until_stopped
from matrixinfer.config import KvEventsConfig
from matrixinfer.feedtools.describe import Line
from matrixinfer.feedtools.listen import Frame, Listener, Note, Stray
from matrixinfer.feedtools.view import FeedView

IDLE_SECONDS = 5.0
"""After this much silence, print what to check."""


def add_parser(commands: Subparsers) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "tail",
        help="show what an engine publishes, live",
        description="Show the KV events of one engine in plain words, one line per event, until Ctrl-C; then a summary. "
        "Times are from the engine's clock, in UTC.",
    )
    parser.add_argument(
        "endpoint",
        type=address,
        metavar="ENDPOINT",
        help="where the engine publishes, such as tcp://10.0.0.1:5557. Or the engine's HTTP URL: then every rank in its "
        "/kv_event_sources is followed, past events first",
    )
    add_arguments(parser, unit="events")
    parser.add_argument(
        "--tokens", action="store_true", help="show the first token ids of stored blocks, which are parts of prompts"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per event, and the summary as the last one"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Follow the engine until a limit is reached or a signal arrives."""
    asyncio.run(tail(args))
    return 0


async def tail(args: argparse.Namespace) -> None:
    """Print events, then the summaries. Raises `ConfigError` or `CannotListen`."""
    printer = _Printer(args, await sources([args.endpoint], args.replay, engine_key(args)))
    async with until_stopped(args.seconds):
        await printer.follow()
    printer.print_summaries()


class _Printer:
    def __init__(self, args: argparse.Namespace, sources: list[KvEventsConfig]) -> None:
        self._args = args
        self._sources = sources
        self._remaining: int | None = args.count
        self._views = {source.endpoint: FeedView(topic=args.topic, with_tokens=args.tokens) for source in sources}

    async def follow(self) -> None:
        """Print events until there are `count`."""
        async with Listener(self._sources) as listener:
            silent = False
            while self._remaining is None or self._remaining > 0:
                news = await listener.next(IDLE_SECONDS)
                if isinstance(news, Note):
                    _print_note(f"{news.publisher}: {news.words}")
                elif isinstance(news, Frame):
                    topic = None if news.topic is None else news.topic.decode("utf-8", "replace")
                    self._show(news.publisher, self._views[news.publisher].frame(news.seq, topic, news.payload))
                elif isinstance(news, Stray):
                    self._show(news.publisher, [self._views[news.publisher].wrong(news.parts)])
                elif not silent:
                    self._explain_silence(listener.connected)
                silent = news is None

    def print_summaries(self) -> None:
        """Print the summary of each publisher."""
        for publisher, view in self._views.items():
            summary = view.summary()
            if self._args.json:
                self._print_value(publisher, {"kind": "summary", **asdict(summary)})
            else:
                print(f"{publisher}: {summary}", flush=True)

    def _show(self, publisher: str, lines: Iterable[Line]) -> None:
        for line in lines:
            if self._remaining == 0:
                return
            if self._args.json:
                self._print_value(publisher, line.value())
            else:
                print(f"{publisher}  {line}" if len(self._views) > 1 else line, flush=True)
            if self._remaining is not None and line.is_event:
                self._remaining -= 1

    def _print_value(self, publisher: str, value: dict[str, object]) -> None:
        print(json.dumps({"publisher": publisher, **value}), flush=True)

    def _explain_silence(self, connected: set[str]) -> None:
        unreached = [publisher for publisher in self._views if publisher not in connected]
        for publisher in unreached:
            _print_note(f"waiting: cannot connect to {publisher} yet. Is the engine up, and its port reachable from here? Is "
                 "this the endpoint on which it publishes, not the one on which it replays?")  # fmt: skip
        if not unreached:
            _print_note("waiting: connected, but no new events. An engine publishes when it stores or drops a block, not when "
                 "it is idle or finds a whole prompt in its cache: send it a new prompt, longer than a block. Are its "
                 "KV events enabled (enable_kv_cache_events)?")  # fmt: skip


def _print_note(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
