"""`python -m watch FOLDER [--page docs/engines.md]`: what the newest engines have that the gateway does not know."""

from __future__ import annotations

import argparse
import datetime as dt
import sys
from pathlib import Path

from watch.compare import differences
from watch.known import ENGINES
from watch.releases import fetch, find
from watch.report import Result, written
from watch.sources import CannotRead, opened


def main() -> int:
    """Print the differences. Returns 1 if there are any, or if a release cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m watch", description=__doc__)
    parser.add_argument("folder", type=Path, help="where releases are kept")
    parser.add_argument("--page", type=Path, help="the page that takes the result, if nothing is new")
    arguments = parser.parse_args()
    today = dt.datetime.now(dt.UTC).date().isoformat()
    found: list[str] = []
    results: dict[str, Result] = {}
    for engine in ENGINES:
        try:
            release = find(engine.package, uv=Path(sys.executable).with_name("uv"))
            with opened(fetch(release, arguments.folder)) as sources:
                news = differences(engine, sources)
        except CannotRead as error:
            news = [f"{engine.title}: {error}"]
        else:
            results[engine.package] = Result(release.version, today)
            print(f"{engine.title} {release.version}: {len(news) or 'no'} difference{'s' * (len(news) != 1)}")
        found += news
    print(*(f"- {line}" for line in found), sep="\n", end="\n" if found else "")
    if arguments.page and not found:
        arguments.page.write_text(written(arguments.page.read_text(), results))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
