"""`python -m tests.streams`: thousands of streams at once over several workers, and what they take."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from matrixinfer.gateway.descriptors import raise_limit
from tests.streams.run import run


def main() -> int:
    """Run, and say how it went: 0 if it passes."""
    parser = argparse.ArgumentParser(prog="python -m tests.streams", description=__doc__)
    parser.add_argument("--streams", type=int, default=2000, help="streams at the same time (default: 2000)")
    parser.add_argument("--workers", type=int, default=2, help="processes of the gateway (default: 2)")
    parser.add_argument("--waves", type=int, default=3, help="how often so many come and go (default: 3)")
    parser.add_argument("--pieces", type=int, default=20, help="of each stream (default: 20)")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two pieces (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result is written")
    args = parser.parse_args()
    raise_limit()
    with TemporaryDirectory() as folder:
        result = asyncio.run(
            run(
                Path(folder),
                streams=args.streams,
                workers=args.workers,
                waves=args.waves,
                pieces=args.pieces,
                pause=args.pause,
                progress=lambda line: print(line, file=sys.stderr, flush=True),
            )
        )
    complaints = [*result.complaints()]
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**asdict(result), "complaints": complaints}, indent=2) + "\n")
    print("\n".join(result.lines()))
    for complaint in complaints:
        print(f"FAILED: {complaint}")
    print("failed" if complaints else "passed")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
