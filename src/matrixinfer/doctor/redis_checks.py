"""What the facts of Redis mean for look-ups. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matrixinfer.doctor.facts import RedisFacts
from matrixinfer.doctor.findings import Verdict, blind, ok, warning

MAX_CLOCK_SECONDS = 5.0
"""Clocks of writers and readers may differ by so much: leases are told by them."""


def server(facts: RedisFacts) -> Iterator[Verdict]:
    """Whether it answers, in time, and runs scripts."""
    worse = blind if facts.looks_up else warning
    if facts.error is not None:
        yield worse(
            f"Redis at {facts.where} cannot be asked: {facts.error}",
            "start it, or mend `redis` in the config; until then requests are routed by load",
        )
        return
    yield ok(f"Redis at {facts.where} answers")
    if facts.slow:
        yield warning(
            "it takes more than half of the look-ups' deadline to answer at all",
            "bring it nearer, or raise redis.deadlineSeconds",
        )
    if facts.refuses_scripts:
        yield warning(
            "it does not let this user run scripts: look-ups take five times as long, and nothing can be written",
            "allow EVALSHA and SCRIPT LOAD (`ACL SETUSER … +evalsha +script|load`)",
        )
    if abs(facts.clock_ahead or 0.0) > MAX_CLOCK_SECONDS:
        yield warning(
            f"its clock differs from the one here by {abs(facts.clock_ahead or 0.0):.0f} s: leases are told by clocks",
            "set the clocks by NTP",
        )


def scheme(facts: RedisFacts) -> Iterator[Verdict]:
    """Whether the blocks there are made as they are made here."""
    for model, there in facts.schemes.items():
        differs = ", ".join(
            f"{name} {there.get(name)} there and {value} here"
            for name, value in facts.scheme.items()
            if there.get(name) not in (None, value)
        )
        worse = blind if facts.looks_up else warning
        yield worse(
            f"blocks of {model} in Redis never match: {differs}",
            "give writers and gateways the same blockSizeToHash and hashScheme",
        )


def writers(facts: RedisFacts, pods: Sequence[str]) -> Iterator[Verdict]:
    """Whether somebody living writes what each pod holds."""
    if facts.error is not None or not facts.looks_up or facts.writer != "agents":
        return
    without = [pod for pod in pods if pod not in facts.vouched]
    if without:
        yield blind(
            f"no agent is alive for {', '.join(without)}, or none that can follow its events",
            "run `matrixinfer agent` beside them, or set index.writer to `gateway`",
        )
    else:
        yield ok("an agent is alive for every pod")
