"""`python -m bench`: runs the benchmarks, prints tables, and writes `bench/results/latest.json`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from rich.console import Console

from bench import (
    dashboard,
    decision,
    engines,
    first_byte,
    growth,
    ingest,
    lookup,
    proxy,
    references,
    report,
    shared_index,
    tokenization,
    workers,
)
from bench.measure import QUICK, Figure, Scale

PARTS: Mapping[str, Callable[[Scale], Iterator[Figure] | Iterator[Figure | str]]] = {
    "decision": decision.run,
    "tokenization": tokenization.run,
    "lookup": lookup.run,
    "references": references.run,
    "ingest": ingest.run,
    "growth": growth.run,
    "engines": engines.run,
    "proxy": proxy.run,
    "workers": workers.run,
    "redis": shared_index.run,
    "first byte": first_byte.run,
    "dashboard": dashboard.run,
}
RESULTS = Path(__file__).parent / "results" / "latest.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Benchmark the decision path, the index, event ingestion and the proxy."
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="run only this part; may be repeated")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="run everything once at a small scale, to check that it works; the figures are meaningless",
    )
    args = parser.parse_args()
    scale = QUICK if args.quick else Scale()
    results, seconds = {}, {}
    for part in args.only or PARTS:
        start = time.perf_counter()
        results[part] = _measure(part, scale)
        seconds[part] = time.perf_counter() - start
    report.publish(results, None if args.only or args.quick else RESULTS, as_json=args.json, seconds=seconds)


def _measure(part: str, scale: Scale) -> list[Figure]:
    figures = []
    with Console(file=sys.stderr).status(part) as status:
        for item in PARTS[part](scale):
            if isinstance(item, str):  # progress
                status.update(f"{part}: {item}")
                continue
            figures.append(item)
            status.update(f"{part}: {item.case}, {item.name}")
    return figures


if __name__ == "__main__":
    main()
