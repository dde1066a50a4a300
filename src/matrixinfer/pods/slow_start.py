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


def shares(
    endpoints: Sequence[Endpoint], *, now: float, seconds: float, withheld: Collection[str] = ()
) -> dict[str, float]:
    """What those of `endpoints` that came up within the last `seconds` get at most of what others have in flight, by name.

    Empty where nobody has been there for longer; those that are `withheld` anyway do not count.
    """
    since = now - seconds
    new = {
        each.name: each.pod.up_since
        for each in endpoints
        if each.pod.up_since is not None and each.pod.up_since > since
    }
    if not new or len(new) == len(endpoints):  # before anything else, as this is part of decisions
        return {}
    if not any(each.name not in new and each.name not in withheld for each in endpoints):
        return {}
    return {name: max(MIN_SHARE, (now - up) / seconds) for name, up in new.items() if name not in withheld}


def held_back(
    endpoints: Sequence[Endpoint],
    in_flight: Callable[[str], int],
    *,
    now: float,
    seconds: float,
    withheld: Collection[str] = (),
) -> dict[str, str]:
    """Those of `endpoints` that came up lately and have their share already, with the reason in words."""
    new = shares(endpoints, now=now, seconds=seconds, withheld=withheld)
    if not new:
        return {}
    settled = [each.name for each in endpoints if each.name not in new and each.name not in withheld]
    average = sum(map(in_flight, settled)) / len(settled)
    held: dict[str, str] = {}
    for each in endpoints:
        share = new.get(each.name)
        if share is None:
            continue
        bound, count = max(1, ceil(share * average)), in_flight(each.name)
        if count >= bound:
            age = now - (each.pod.up_since or 0.0)
            held[each.name] = f"came up {age:.0f} s ago and has {count} in flight, its share is {bound}"
    return held
