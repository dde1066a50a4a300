"""Checks of the shared index in Redis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matrixinfer.doctor.facts import ForeignFacts, RedisFacts
from matrixinfer.doctor.findings import Verdict, blind, ok, warning
from matrixinfer.doctor.redis_foreign import WRITE_SECONDS
from matrixinfer.index.redis.failures import explained

MAX_CLOCK_SECONDS = 5.0
"""Leases compare clocks of different hosts: they work up to this much difference."""


def server(facts: RedisFacts) -> Iterator[Verdict]:
    """Whether the server answers, fast enough, and runs scripts."""
    worse = blind if facts.is_index else warning
    if facts.error is not None:
        yield worse(*_unusable(facts, facts.error))
        return
    for key in facts.unreadable:
        yield warning(
            f"the key `{key}` in Redis holds something else than a hash, and reads as empty",
            "delete it, or use a database (`redis.db`) that no other program uses",
        )
    yield ok(f"Redis at {facts.where} answers")
    if facts.slow:
        yield warning(
            "Redis takes more than half of the lookup deadline for its simplest answer",
            "move it closer, or increase redis.deadlineSeconds",
        )
    if facts.refuses_scripts:
        yield warning(
            "Redis does not let this user run scripts: lookups take five times as long"
            + ("" if facts.writer == "none" else ", and nothing can be written"),
            "allow EVALSHA, SCRIPT LOAD and what the scripts use (`ACL SETUSER … +evalsha +script|load`, with keys as `~`, not "
            "`%R~`; docs/redis.md lists all commands)"
            + ("" if facts.writer != "none" else ", or set redis.scripts to false"),
        )
    if abs(facts.clock_ahead or 0.0) > MAX_CLOCK_SECONDS:
        yield warning(
            f"the clock of Redis differs from the local one by {abs(facts.clock_ahead or 0.0):.0f} s: writers may seem dead or "
            "alive when they are not",
            "synchronize both clocks, for example with NTP",
        )


def _unusable(facts: RedisFacts, error: str) -> tuple[str, str]:
    """The message and the fix for a server that cannot be used."""
    message, fix = explained(facts.failure, where=facts.where, username=facts.username, error=error)
    return message, f"{fix}; until then, requests are routed by load"


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


def foreign(facts: ForeignFacts) -> Iterator[Verdict]:
    """Whether lookups can match what writers of other projects have written."""
    for message, fix in facts.mismatches:
        yield blind(message, fix)
    for model in facts.absent:
        yield warning(
            f"the blocks of a new prompt of {model} did not appear in Redis within {WRITE_SECONDS:g} s, under no scheme and "
            "size that were tried",
            "check that a writer runs for each engine, and that it can read the engine's events (docs/redis.md says which "
            "do)",
        )
    for model in facts.fits:
        yield ok(f"the blocks of a new prompt of {model} are in Redis as the gateway looks for them")
    if facts.without_start:
        yield warning(
            f"{', '.join(facts.without_start)} do not report when they started (`process_start_time_seconds` in /metrics): "
            "what was cached before a restart counts until it is too old",
            "run `matrixinfer agent`, which notices restarts, or lower index.maxAgeSeconds",
        )
    if not (facts.mismatches or facts.probed):
        yield warning(
            "no prompt was sent whose blocks could be looked for in Redis, so it is not known whether lookups can match",
            "let the doctor probe the engines; it needs their KV events for that",
        )
