"""Checks of one engine, other than its events: version, cache, blocks, tokens, usage and clock."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from matrixinfer.doctor.facts import PodFacts, ProbeFacts
from matrixinfer.doctor.findings import Verdict, blind, ok, warning
from matrixinfer.kvevents.ledger import SMALL_BLOCK
from matrixinfer.prompt.samples import SampleFacts
from matrixinfer.prompt.source import Source

LARGE_BLOCK = 1024
"""With more tokens per block, many prompts fill no block."""
MAX_SKEW_SECONDS = 2.0

_CACHING_FIX = "start the engine without --no-enable-prefix-caching"
_DETAILS_FIX = "start the engine with --enable-prompt-tokens-details"


def engine(pod: PodFacts) -> Iterator[Verdict]:
    """Which engine it is, and what its events do not include."""
    hidden = [
        name
        for name, hides in (
            ("salts", any(feed.hides_salts for feed in pod.feeds)),
            ("adapters", any(feed.hides_adapters for feed in pod.feeds)),
        )
        if hides
    ]
    release = _release(pod.version)
    if pod.engine == "sglang":
        yield _sglang(pod.version, hidden)
        return
    shown = f"vLLM {pod.version}" if release else "an engine of unknown version"
    if (release and release < (0, 20)) or (hidden and not release):
        yield warning(
            f"the engine is {shown}, whose events omit {' and '.join(hidden) or 'salts and some adapters'}: prompts that "
            "use them look like plain ones",
            "upgrade to vLLM 0.20 or later",
        )
    elif hidden:
        yield warning(f"the engine is {shown}, but its events omit {' and '.join(hidden)}", "upgrade the engine")
    elif release and release < (0, 28):
        yield ok(f"the engine is {shown}; the gateway supports its older event format")
    else:
        yield ok(f"the engine is {shown}" if release else "the engine does not say its version")


def _sglang(version: str | None, hidden: Sequence[str]) -> Verdict:
    release = re.match(r"v?(\d+)\.(\d+)\.(\d+)", version or "")
    shown = f"SGLang {version}" if version else "SGLang of unknown version"
    is_old = release is not None and tuple(map(int, release.groups())) < (0, 5, 23)
    if is_old or hidden:
        omitted = " and ".join(hidden) or "salts and adapters"
        return warning(
            f"the engine is {shown}, whose events omit {omitted}: prompts that use them look like plain ones",
            "upgrade to SGLang 0.5.23 or later, or serve prompts with salts or adapters from vLLM",
        )
    return ok(f"the engine is {shown}")


def sleep(pod: PodFacts) -> Iterator[Verdict]:
    """Whether the engine is awake."""
    if pod.asleep is not None:
        emptied = "" if pod.asleep == "paused" else ", and its cache is empty"
        yield warning(
            f"the engine sleeps ({pod.asleep}){emptied}: it gets requests only while no other pod of its model is awake",
            "wake it up with POST /wake_up, or remove it from the pods",
        )


def caching(pod: PodFacts) -> Iterator[Verdict]:
    """Whether prefix caching is on."""
    if pod.prefix_caching is False:
        yield blind("prefix caching is off: the engine never reuses a prompt", _CACHING_FIX)
    elif any(_found_nothing(probe) for probe in pod.probes) and not any(feed.frames for feed in pod.feeds):
        yield blind(
            "a prompt that was sent twice was not found in the cache, and no event was published: prefix caching seems off",
            _CACHING_FIX,
        )
    elif pod.prefix_caching or any(probe.cached or probe.hits for probe in pod.probes):
        yield ok("prefix caching is on")


def _found_nothing(probe: ProbeFacts) -> bool:
    return not probe.cached and not probe.hits and (probe.cached is not None or probe.hits is not None)


def blocks(pod: PodFacts) -> Iterator[Verdict]:
    """Whether the block sizes of engine and gateway suit each other and the prompts."""
    ours, theirs = pod.token_block, pod.engine_block
    if theirs is None:
        return
    length, needed = None if pod.served is None else pod.served.context_length, max(ours, theirs)
    if length is not None and length <= needed:
        yield blind(
            f"no prompt ever fills a block of {needed} tokens: the engine accepts at most {length} tokens",
            "lower blocks.size" if ours > theirs else "lower the engine's --block-size",
        )
    elif needed > LARGE_BLOCK:
        yield warning(
            f"prompts shorter than {needed} tokens fill no block, so no cached blocks are ever found for them",
            "lower blocks.size" if ours > theirs else "lower the engine's --block-size",
        )
    elif theirs < SMALL_BLOCK:
        yield warning(
            f"the engine's blocks have {_tokens(theirs)}: every few tokens cost an event and an entry in the index",
            f"start the engine with at least {SMALL_BLOCK} tokens per block (--block-size; SGLang: --page-size)",
        )
    elif ours % theirs and theirs % ours:
        yield warning(
            f"the engine's blocks have {theirs} tokens and blocks.size is {ours}: neither divides the other, so that the "
            "index does two to three times the work",
            f"set blocks.size to {theirs} or a multiple of it",
        )
    else:
        hidden = (
            f", which hides up to {ours - theirs} tokens of each hit; {theirs} would hide none" if ours > theirs else ""
        )
        yield ok(f"the engine's blocks have {theirs} tokens, blocks.size is {ours}{hidden}")


def tokens(pod: PodFacts) -> Iterator[Verdict]:
    """Whether the gateway computes the token ids that the engine caches."""
    same = [sample for sample in pod.samples if sample.compared and sample.first_difference is None]
    for is_chat in (False, True):
        yield from _unequal([sample for sample in pod.samples if sample.is_chat is is_chat])
    source = pod.source
    if same:
        found = f", with the tokenizer found at {source.path}" if source is not None and source.kind == "found" else ""
        yield ok(f"the gateway computes the engine's token ids for {_named(same, pod.samples)}{found}")
    elif pod.samples and not any(
        sample.compared or sample.gateway_error or sample.engine_error for sample in pod.samples
    ):
        words = f"token ids come from the engine's own /tokenize{_cost(pod)}"
        if _asks_too_long(pod):
            yield warning(
                f"{words}; a decision waits {pod.wait_ms:g} ms, so most are made without token ids",
                "set `tokenizer` of the model to its folder, or raise tokenization.waitMilliseconds",
            )
        else:
            yield ok(words)
    if source is not None:
        yield from _refused(source)


def sent_ids(pod: PodFacts) -> Iterator[Verdict]:
    """Whether the engine makes the same answer from token ids, where the gateway is to send them."""
    same = [each.path for each in pod.sent_ids if each.outcome == "honoured"]
    if same:
        yield ok(f"the engine makes the same answer from token ids: {' and '.join(same)} may carry them")
    for each in pod.sent_ids:
        if each.outcome != "honoured":
            yield warning(
                f"{each.path} gets no token ids ({each.outcome}): {each.why}",
                "the engine makes them itself, as with tokenization.sendIds: never; vLLM takes them in chats since 0.27, "
                "SGLang since 0.5.15"
                if each.outcome in ("ignored", "refused")
                else "see what `tokens` says of this pod; the gateway asks again from time to time",
            )


def _refused(source: Source) -> Iterator[Verdict]:
    """What was found and is not used."""
    for path, reason in source.refused.items():
        yield warning(
            f"the tokenizer found at {path} is not used: {reason}",
            "set `tokenizer` of the model to the folder of the model that the engine serves, in the same revision; or leave "
            "it to the engine's /tokenize",
        )
    if source.kind == "found" and source.asks_for_chats:
        yield warning(
            f"the tokenizer found at {source.path} is used for texts only; chats go to the engine's /tokenize: "
            f"{source.reason}",
            "set `tokenizer` of the model, and `chatTemplate` to the engine's template, or leave chats to the engine",
        )


def _asks_too_long(pod: PodFacts) -> bool:
    median = None if pod.asking is None else pod.asking["p50_ms"]
    return isinstance(median, float) and pod.wait_ms is not None and median > pod.wait_ms


def _cost(pod: PodFacts) -> str:
    """What asking costs, and why nobody else is asked."""
    why = "" if pod.source is None or pod.source.reason is None else f" ({pod.source.reason})"
    if pod.asking is None or pod.asking["p50_ms"] is None:
        return why
    return f"{why}, which took {pod.asking['p50_ms']} ms (p50) and {pod.asking['p90_ms']} ms (p90) for one prompt"


def _unequal(samples: Sequence[SampleFacts]) -> Iterator[Verdict]:
    """What is wrong with the texts or the chats; the same problem is reported once."""
    differ = [sample for sample in samples if sample.compared and sample.first_difference is not None]
    unknown = [sample for sample in samples if sample.engine_error is not None and sample.gateway_error is None]
    failed = [
        sample
        for sample in samples
        if sample.gateway_error is not None and (sample.engine_error is None or not sample.optional)
    ]
    if differ:
        yield _differs(differ[0], _more(differ, "so do"))
    if unknown:
        yield warning(
            f"the token ids of {unknown[0].name} could not be compared with the engine's: {unknown[0].engine_error}"
            f"{_more(unknown, 'neither could')}",
            "let the gateway reach the engine's /tokenize, or compare with `matrixinfer tokenize --compare URL`",
        )
    if failed:
        yield blind(
            f"{failed[0].name} cannot be tokenized: {failed[0].gateway_error}{_more(failed, 'neither can')}",
            "set `tokenizer` of the model and, if the tokenizer has no chat template, `chatTemplate`; or let the gateway "
            "reach the engine's /tokenize",
        )


def _more(samples: Sequence[SampleFacts], verb: str) -> str:
    """The other samples with the same problem."""
    others = [sample.name for sample in samples[1:]]
    return f" ({verb} {', '.join(others)})" if others else ""


def _named(samples: Sequence[SampleFacts], among: Sequence[SampleFacts]) -> str:
    """Their names; a count where there are several chats and all are the same."""
    chats = [sample for sample in samples if sample.is_chat]
    if len(chats) > 1 and len(chats) == sum(sample.is_chat for sample in among):
        return ", ".join((*(each.name for each in samples if not each.is_chat), f"{len(chats)} kinds of chats"))
    return ", ".join(sample.name for sample in samples)


def _differs(sample: SampleFacts, others: str) -> Verdict:
    return blind(
        f"the gateway's token ids are not the engine's: {sample.name} differs from token {sample.first_difference} on"
        f"{others}",
        "set `chatTemplate` to the engine's template (its --chat-template and --default-chat-template-kwargs), and "
        "`tokenizer` to the folder of its model"
        if sample.is_chat
        else "set `tokenizer` to the folder of the model that the engine serves, in the same revision",
    )


def usage(pod: PodFacts) -> Iterator[Verdict]:
    """Whether answers report cached tokens."""
    if not pod.probes:
        return
    if any(probe.cached is not None for probe in pod.probes):
        yield ok("answers report how many tokens were cached")
    elif any(probe.hits or (probe.hits is None and probe.predicted) for probe in pod.probes):
        yield warning(
            "answers do not report how many tokens were cached, so that drift between index and cache is noticed late",
            _DETAILS_FIX,
        )


def clock(pod: PodFacts) -> Iterator[Verdict]:
    """Whether its clock agrees with the local one."""
    measured = [
        seconds for seconds in (pod.clock_ahead, *(feed.clock_ahead for feed in pod.feeds)) if seconds is not None
    ]
    worst = max(measured, key=abs, default=None)
    if worst is None:
        return
    if abs(worst) > MAX_SKEW_SECONDS:
        yield warning(
            f"the engine's clock is {abs(worst):.0f} s {'ahead of' if worst > 0 else 'behind'} the local one, so that "
            "matrixinfer_kv_lag_seconds is wrong by as much",
            "synchronize both clocks, for example with NTP",
        )
    else:
        yield ok("the engine's clock agrees with the local one")


def _release(version: str | None) -> tuple[int, int] | None:
    found = re.match(r"v?(\d+)\.(\d+)", version or "")
    return (int(found[1]), int(found[2])) if found else None


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"
