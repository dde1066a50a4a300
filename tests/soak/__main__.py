"""`python -m tests.soak`: gateways under everything at once, and whether they are afterwards what they were before."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.soak import report
from tests.soak.run import soak


def main() -> int:
    """Run, and say how it went: 0 if it passes."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long requests are sent (default: 600)")
    parser.add_argument("--clients", type=int, default=200, help="how many clients there are (default: 200)")
    parser.add_argument("--rounds", type=int, default=12, help="rests, at which leaks are measured (default: 12)")
    parser.add_argument(
        "--index", choices=["memory", "redis"], default="memory", help="redis: two gateways around one Valkey"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what clients and faults do (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result is written")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="where the logs are kept (default: nowhere)")
    args = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder = args.logs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result, tally = asyncio.run(
            soak(
                folder,
                seconds=args.seconds,
                clients=args.clients,
                rounds=args.rounds,
                redis=args.index == "redis",
                seed=args.seed,
                progress=lambda line: print(line, file=sys.stderr, flush=True),
            )
        )
    data = result.as_data(tally)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(data, indent=2) + "\n")
    print("\n".join(report.show(result, tally)))
    for complaint in result.complaints(tally):
        print(f"FAILED: {complaint}")
    print("passed" if data["passed"] else "failed")
    return 0 if data["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
