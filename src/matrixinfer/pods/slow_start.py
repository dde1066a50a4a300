"""Lets a pod that has just come up take its share bit by bit, so that it does not draw every new prompt at once. Pure.

Such a pod has nothing in flight and, after a start, still compiles and fills its caches. All that looks at load would
send it everything that is new. So an endpoint of it gets at most a share of what endpoints that have been there for
longer have in flight on average; the share grows with its age.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from math import ceil

from matrixinfer.pods.pod import Endpoint

MIN_SHARE = 0.1
"""The share that an endpoint begins with."""


def held_back(
    endpoints: Sequence[Endpoint],
    in_flight: Callable[[str], int],
    *,
    now: float,
    seconds: float,
    withheld: Collection[str] = (),
) -> dict[str, str]:
    """Those of `endpoints` that came up within the last `seconds` and have their share already, with the reason in words.

    Nobody is held back where nobody has been there for longer; those that are `withheld` anyway do not count.
    """
    since = {endpoint.name: endpoint.pod.up_since for endpoint in endpoints if endpoint.name not in withheld}
    new = {name: now - up for name, up in since.items() if up is not None and now - up < seconds}
    settled = [name for name in since if name not in new]
    if not (new and settled):
        return {}
    average = sum(map(in_flight, settled)) / len(settled)
    held: dict[str, str] = {}
    for name, age in new.items():
        bound = max(1, ceil(max(MIN_SHARE, age / seconds) * average))
        count = in_flight(name)
        if count >= bound:
            held[name] = f"came up {age:.0f} s ago and has {count} in flight, its share is {bound}"
    return held
