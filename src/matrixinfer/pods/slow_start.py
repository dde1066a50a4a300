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
    since = now - seconds
    new = [each for each in endpoints if each.pod.up_since is not None and each.pod.up_since > since]
    if not new or len(new) == len(endpoints):  # before anything else, as this is part of decisions
        return {}
    names = {each.name for each in new}
    settled = [each.name for each in endpoints if each.name not in names and each.name not in withheld]
    if not settled:
        return {}
    average = sum(map(in_flight, settled)) / len(settled)
    held: dict[str, str] = {}
    for name, up in ((each.name, each.pod.up_since or 0.0) for each in new if each.name not in withheld):
        age = now - up
        bound = max(1, ceil(max(MIN_SHARE, age / seconds) * average))
        count = in_flight(name)
        if count >= bound:
            held[name] = f"came up {age:.0f} s ago and has {count} in flight, its share is {bound}"
    return held
