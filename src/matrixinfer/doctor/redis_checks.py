"""Checks of the shared index in Redis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matrixinfer.doctor.facts import RedisFacts
from matrixinfer.doctor.findings import Verdict, blind, ok, warning

MAX_CLOCK_SECONDS = 5.0
"""Leases compare clocks of different hosts: they work up to this much difference."""


def server(facts: RedisFacts) -> Iterator[Verdict]:
    """Whether the server answers, fast enough, and runs scripts."""
    worse = blind if facts.is_index else warning
    if facts.error is not None:
        yield worse(
            f"Redis at {facts.where} does not answer: {facts.error}",
            "start it, or correct `redis` in the config; until then, requests are routed by load",
        )
        return
    yield ok(f"Redis at {facts.where} answers")
    if facts.slow:
        yield warning(
            "Redis takes more than half of the lookup deadline for its simplest answer",
            "move it closer, or increase redis.deadlineSeconds",
        )
    if facts.refuses_scripts:
        yield warning(
            "Redis does not let this user run scripts: lookups take five times as long, and nothing can be written",
            "allow EVALSHA and SCRIPT LOAD (`ACL SETUSER … +evalsha +script|load`)",
        )
    if abs(facts.clock_ahead or 0.0) > MAX_CLOCK_SECONDS:
        yield warning(
            f"the clock of Redis differs from the local one by {abs(facts.clock_ahead or 0.0):.0f} s: writers may seem dead or "
            "alive when they are not",
            "synchronize both clocks, for example with NTP",
        )


def scheme(facts: RedisFacts) -> Iterator[Verdict]:
    """Whether blocks in Redis have the gateway's block size and hash scheme."""
    for model, there in facts.schemes.items():
        differs = ", ".join(
            f"{name} is {there.get(name)} there and {value} here"
            for name, value in facts.scheme.items()
            if there.get(name) not in (None, value)
        )
        worse = blind if facts.is_index else warning
        yield worse(
            f"blocks of {model} in Redis never match: {differs}",
            "set the same blocks.size and blocks.scheme for all writers and gateways",
        )


def writers(facts: RedisFacts, endpoints: Sequence[str]) -> Iterator[Verdict]:
    """Whether a live agent writes the blocks of every endpoint."""
    if facts.error is not None or not facts.is_index or facts.writer != "agents":
        return
    without = [endpoint for endpoint in endpoints if endpoint not in facts.endpoints_written]
    if without:
        yield blind(
            f"no live agent that can follow the events writes for {', '.join(without)}",
            "run `matrixinfer agent` for them, or set index.writer to `gateway`",
        )
    else:
        yield ok("a live agent writes for every pod")
