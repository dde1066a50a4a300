"""`python -m bench.peers`: CPU time per request and chunk, added latency and requests per core, ours and others'.

Two engines that answer at once stand behind every router. The rounds of the routers alternate.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import aiohttp
import uvloop
from rich.console import Console

from bench import report
from bench.measure import Figure
from bench.peers.load import LOADS, QUICK, Cost, Load, measure
from bench.peers.routers import OURS, PEERS, Router, gateway, running
from bench.proxy import server_process, server_url

_ENGINES = 2
_ROUNDS = 5
RESULTS = Path(__file__).parents[1] / "results" / "peers.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print tables, and write `bench/results/peers.json`."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".peers"), help="where the others are installed")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help="rounds of each load (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--ours-only", action="store_true", help="install and start no other router")
    parser.add_argument("--quick", action="store_true", help="see that it runs; the figures are meaningless")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    peers = () if args.ours_only else PEERS
    for peer in peers:
        peer.install(args.folder)
    with ExitStack() as stack:
        engines = [server_url(stack.enter_context(server_process("upstream"))) for _ in range(_ENGINES)]
        routers = [stack.enter_context(running(OURS, args.folder, engines, gateway))]
        routers += [stack.enter_context(running(peer.package, args.folder, engines, peer.arguments)) for peer in peers]
        loads = QUICK if args.quick else LOADS
        costs = uvloop.run(_rounds(loads, routers, engines, 1 if args.quick else args.rounds))
    names = [router.name for router in routers]
    results = {
        "CPU per request or chunk": list(_cpu(loads, names, costs)),
        "requests per core and second": list(_requests(loads, names, costs)),
        "added to the engine's own time": list(_added(loads, names, costs)),
    }
    report.publish(results, None if args.quick or args.ours_only else RESULTS, as_json=args.json)
    return 0


async def _rounds(
    loads: Sequence[Load], routers: Sequence[Router], engines: Sequence[str], rounds: int
) -> Mapping[tuple[str, str], list[Cost]]:
    """The costs by case and router, and those of an engine alone as `engine`."""
    costs: dict[tuple[str, str], list[Cost]] = {}
    alone = Router(name="engine", url=engines[0], pid=os.getpid())
    turns = [*routers, alone]
    timeout = aiohttp.ClientTimeout(total=120)
    connector = aiohttp.TCPConnector(limit=0)
    with Console(file=sys.stderr).status("peers") as status:
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            for load in loads:
                for number in range(rounds + 1):
                    turns.reverse()
                    for place, router in enumerate(turns):
                        status.update(f"{load.case}: round {number} of {rounds}, {router.name}")
                        cost = await measure(session, load, router, seed=number * len(turns) + place)
                        if number:  # the first one warms up
                            costs.setdefault((load.case, router.name), []).append(cost)
    return costs


def _cpu(loads: Sequence[Load], names: Sequence[str], costs: Mapping[tuple[str, str], list[Cost]]) -> Iterator[Figure]:
    for load in loads:
        spent = {name: [cost.cpu_us for cost in costs[load.case, name]] for name in names}
        for name in names:
            yield Figure(case=load.case, name=name, value=median(spent[name]), unit="µs")
        for name in names:
            if name != OURS:
                times = median(a / b for a, b in zip(spent[OURS], spent[name], strict=True))
                yield Figure(case=load.case, name=f"ours / {name}", value=times, unit="×")


def _requests(
    loads: Sequence[Load], names: Sequence[str], costs: Mapping[tuple[str, str], list[Cost]]
) -> Iterator[Figure]:
    for load in loads:
        for name in names if not load.chunks else ():
            spent = median(cost.cpu_us for cost in costs[load.case, name])
            yield Figure(case=load.case, name=name, value=1e6 / spent, unit="1/s")


def _added(
    loads: Sequence[Load], names: Sequence[str], costs: Mapping[tuple[str, str], list[Cost]]
) -> Iterator[Figure]:
    for load in loads:
        for share in (0.5, 0.99) if not load.chunks else ():
            alone = median(cost.quantile(share) for cost in costs[load.case, "engine"])
            for name in names:
                took = median(cost.quantile(share) for cost in costs[load.case, name])
                yield Figure(case=f"{load.case}, p{share * 100:g}", name=name, value=took - alone, unit="ms")


if __name__ == "__main__":
    sys.exit(main())
