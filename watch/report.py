"""The part of docs/engines.md that says which releases were read, and what the gateway reads of their events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from watch.known import ENGINES, Engine, Known
from watch.sources import CannotRead

BEGIN, END = "<!-- check-engines: begin -->", "<!-- check-engines: end -->"


class Result(NamedTuple):
    """The newest release of an engine that differs in nothing from what is known."""

    version: str
    date: str
    """ISO 8601."""


def section(results: Mapping[str, Result]) -> str:
    """The Markdown between the marks. `results` are by package."""
    return "\n".join([*_releases(results), "", *known_names()])


def _releases(results: Mapping[str, Result]) -> Iterator[str]:
    yield "| engine | newest release that was read | on | found |"
    yield "|---|---|---|---|"
    for engine in ENGINES:
        result = results[engine.package]
        yield f"| {engine.title} | {result.version} | {result.date} | nothing that the gateway does not know |"


def known_names() -> Iterator[str]:
    """A table of what is read, and of what is not and why."""
    yield "| engine | names | read | not read, and why |"
    yield "|---|---|---|---|"
    for engine in ENGINES:
        for what, known in _parts(engine):
            read = ", ".join(f"`{name}`" for name in known.read)
            unread = "; ".join(f"`{name}`: {why}" for name, why in known.unread.items())
            yield f"| {engine.title} | {what} | {read} | {unread} |"


def _parts(engine: Engine) -> Iterator[tuple[str, Known]]:
    for name, known in engine.structs.items():
        if known.all:
            yield f"fields of `{name}`", known
    if engine.kinds is not None:
        yield "kinds of attention", engine.kinds
    yield "media", engine.media
    yield "over HTTP", Known(read=tuple(word for words in engine.strings.values() for word in words))


def written(page: str, results: Mapping[str, Result]) -> str:
    """The page with a new section. Raises `CannotRead`."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise CannotRead(f"the page lacks the lines {BEGIN} and {END}. Put them where the result belongs")
    return f"{before}{BEGIN}\n{section(results)}\n{END}{after}"
