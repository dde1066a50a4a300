"""What is asked of one engine, but for its events: its model, version, cache, tokens, usage and clock."""

from __future__ import annotations

import re
from collections.abc import Iterator

from matrixinfer.doctor.facts import PodFacts, ProbeFacts, SampleFacts
from matrixinfer.doctor.findings import Verdict, blind, ok, warning
from matrixinfer.prompt.tokenize_requests import SGLANG

SMALL_BLOCK = 16
"""Tokens per engine block below which events and memory grow out of proportion."""
LARGE_BLOCK = 1024
"""Tokens per block that many prompts do not fill."""
MAX_SKEW_SECONDS = 2.0

_CACHING_FIX = "start the engine without --no-enable-prefix-caching"
_DETAILS_FIX = "start the engine with --enable-prompt-tokens-details"


def engine(pod: PodFacts) -> Iterator[Verdict]:
    """Which engine it is, and what its release does not tell."""
    hidden = [
        name
        for name, hides in (
            ("salts", any(feed.hides_salts for feed in pod.feeds)),
            ("adapters", any(feed.hides_adapters for feed in pod.feeds)),
        )
        if hides
    ]
    release = _release(pod.version)
    shown = f"vLLM {pod.version}" if release else "an engine that does not tell its release"
    if pod.served is not None and pod.served.engine == SGLANG:
        yield warning(
            "it is SGLang, whose events hide salts and adapters: prompts that use them look like plain ones",
            "send salted prompts and adapters to vLLM; use a release that hashes pages with their parents, and "
            "--page-size 16 or more",
        )
    elif (release and release < (0, 20)) or (hidden and not release):
        yield warning(
            f"it is {shown}, whose events hide {' and '.join(hidden) or 'salts and some adapters'}: prompts that use "
            "them look like plain ones",
            "upgrade to vLLM 0.20 or later",
        )
    elif hidden:
        yield warning(f"it is {shown}, but its events hide {' and '.join(hidden)}", "upgrade the engine")
    elif release and release < (0, 28):
        yield ok(f"it is {shown}; its older form of events and replays is understood")
    else:
        yield ok(f"it is {shown}")


def caching(pod: PodFacts) -> Iterator[Verdict]:
    """Whether it keeps the blocks of prompts at all."""
    if pod.prefix_caching is False:
        yield blind("prefix caching is off: it never reuses a prompt", _CACHING_FIX)
    elif any(_found_nothing(probe) for probe in pod.probes) and not any(feed.frames for feed in pod.feeds):
        yield blind(
            "the same prompt, sent twice, found nothing in the cache and no event told of it: prefix caching seems off",
            _CACHING_FIX,
        )
    elif pod.prefix_caching or any(probe.cached or probe.hits for probe in pod.probes):
        yield ok("prefix caching is on")


def _found_nothing(probe: ProbeFacts) -> bool:
    return not probe.cached and not probe.hits and (probe.cached is not None or probe.hits is not None)


def blocks(pod: PodFacts) -> Iterator[Verdict]:
    """Whether engine blocks and token blocks suit each other and the prompts."""
    mine, theirs = pod.token_block, pod.engine_block
    if theirs is None:
        return
    length, needed = None if pod.served is None else pod.served.context_length, max(mine, theirs)
    if length is not None and length <= needed:
        yield blind(
            f"no prompt ever fills a block of {needed} tokens: the engine takes {length} tokens at most",
            "lower blockSizeToHash" if mine > theirs else "lower the engine's --block-size",
        )
    elif needed > LARGE_BLOCK:
        yield warning(
            f"prompts shorter than {needed} tokens fill no block, so they are never found in a cache",
            "lower blockSizeToHash" if mine > theirs else "lower the engine's --block-size",
        )
    elif theirs < SMALL_BLOCK:
        yield warning(
            f"its blocks have {_tokens(theirs)}: every few tokens cost an event and an entry in the index",
            f"start it with blocks of {SMALL_BLOCK} tokens or more (--block-size; SGLang: --page-size)",
        )
    elif mine % theirs and theirs % mine:
        yield warning(
            f"its blocks have {theirs} tokens, blockSizeToHash is {mine}: neither divides the other, so the index does "
            "two to three times the work",
            f"set blockSizeToHash to {theirs}, or a multiple of it",
        )
    else:
        yield ok(f"its blocks have {theirs} tokens, blockSizeToHash is {mine}")


def tokens(pod: PodFacts) -> Iterator[Verdict]:
    """Whether prompts get the ids here that the engine caches."""
    same = [sample.what for sample in pod.samples if sample.compared and sample.first_difference is None]
    for sample in pod.samples:
        if sample.compared and sample.first_difference is not None:
            yield _differs(sample)
        elif sample.there is not None and sample.here is None:
            yield warning(
                f"{sample.what} could not be compared with the engine's ids: {sample.there}",
                "let the gateway reach the engine's /tokenize; or compare with matrixinfer tokenize --compare URL",
            )
        elif sample.here is not None and (sample.there is None or not sample.optional):
            yield blind(
                f"{sample.what} cannot be tokenized: {sample.here}",
                "give the model a tokenizer and, where it has none of its own, a chatTemplate; without either, let the "
                "engine's /tokenize be reached",
            )
    if same:
        yield ok(f"the ids made here are the engine's for {', '.join(same)}")
    elif pod.samples and not any(sample.compared or sample.here or sample.there for sample in pod.samples):
        yield ok("the engine's own /tokenize makes the ids")


def _differs(sample: SampleFacts) -> Verdict:
    is_text = "text" in sample.what
    return blind(
        f"the ids made here are not the engine's: {sample.what} differs from token {sample.first_difference} on",
        "take the folder that the engine serves, of the same revision, as `tokenizer`"
        if is_text
        else "give the engine's template as `chatTemplate` (--chat-template, --default-chat-template-kwargs there), and "
        "its folder as `tokenizer`",
    )


def usage(pod: PodFacts) -> Iterator[Verdict]:
    """Whether answers tell of cached tokens."""
    if not pod.probes:
        return
    if any(probe.cached is not None for probe in pod.probes):
        yield ok("its answers tell how many tokens were cached")
    elif any(probe.hits or (probe.hits is None and probe.predicted) for probe in pod.probes):
        yield warning(
            "its answers do not tell how many tokens were cached, so that drift between index and cache is seen late",
            _DETAILS_FIX,
        )


def clock(pod: PodFacts) -> Iterator[Verdict]:
    """Whether its clock is ours."""
    measured = [
        seconds for seconds in (pod.clock_ahead, *(feed.clock_ahead for feed in pod.feeds)) if seconds is not None
    ]
    worst = max(measured, key=abs, default=None)
    if worst is None:
        return
    if abs(worst) > MAX_SKEW_SECONDS:
        yield warning(
            f"its clock is {abs(worst):.0f} s {'ahead of' if worst > 0 else 'behind'} the one here, so that "
            "matrixinfer_kv_lag_seconds is wrong by as much",
            "synchronize both clocks (NTP)",
        )
    else:
        yield ok("its clock agrees with the one here")


def _release(version: str | None) -> tuple[int, int] | None:
    found = re.match(r"v?(\d+)\.(\d+)", version or "")
    return (int(found[1]), int(found[2])) if found else None


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"
