"""Reads the gateway's own access log as a trace."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from matrixinfer.study.formats import TraceError, lines, name_of
from matrixinfer.study.trace import Alphabet, Trace, Turn, filled
from matrixinfer.telemetry.access_entry import AccessEntry

KEYS = {"at", "outcome", "ms"}
"""Keys of every line."""


@dataclass(slots=True, kw_only=True)
class _Request:
    """A line that is replayed, in blocks of the trace."""

    entry: AccessEntry
    prompt: int
    chain: array[int]
    """A letter for each block whose hash is known."""

    @property
    def ended(self) -> float:
        """Unix time in seconds."""
        return self.entry.at + self.entry.ms["total"] / 1000


@dataclass(slots=True)
class _Left:
    """Lines that are not replayed, and lines that lack something."""

    unreadable: int = 0
    not_computed: int = 0
    """No pod has computed the prompt, or its length is unknown."""
    without_blocks: int = 0
    """Nothing of the prompt is known but its length: it shares nothing with others."""
    without_beginning: int = 0
    """The lines with the first blocks are not in the file."""
    without_output: int = 0
    """The length of the answer is unknown: that of the median is taken."""
    models: set[str] = field(default_factory=set)


def access_log(path: Path, *, block_size: int | None = None) -> Trace:
    """The requests that pods have computed, with the times between them. Raises `TraceError`.

    A request of a session is sent when the last request of the session that had ended before it has its answer, after the
    time that then passed; others come when they came. What a reply said is known where a later prompt continues with it.
    Lines may be of several gateways, and in any order, but for those of one gateway.
    """
    left, alphabet = _Left(), Alphabet()
    requests = sorted(_requests(path, left, alphabet), key=lambda each: each.entry.at)
    sizes = {each.entry.block_size for each in requests if each.entry.block_size is not None}
    if not requests:
        raise TraceError(f"{path}: no request in it was computed by a pod")
    if len(sizes) > 1:
        raise TraceError(f"{path}: expected blocks of one size, found {', '.join(map(str, sorted(sizes)))} tokens")
    logged = next(iter(sizes), block_size or 128)
    size = block_size or logged
    if size % logged:
        raise TraceError(f"{path}: expected blocks of a multiple of {logged} tokens with --block-tokens, got {size}")
    for each in requests:
        each.chain = each.chain[size // logged - 1 :: size // logged]
    settings: dict[str, object] = {
        "block_size": size,
        "models": len(left.models),
        "unreadable_lines": left.unreadable,
        "not_computed": left.not_computed,
        "without_blocks": left.without_blocks,
        "without_beginning": left.without_beginning,
        "without_output": left.without_output,
        "recorded": _recorded(requests),
    }
    return Trace(name=name_of(path), block_size=size, turns=_turns(requests, size, alphabet), settings=settings)


def _requests(path: Path, left: _Left, alphabet: Alphabet) -> Iterator[_Request]:
    chains = _Chains()
    decoder = msgspec.json.Decoder(AccessEntry)
    for line in lines(path):
        try:
            entry = decoder.decode(line)
        except msgspec.MsgspecError:  # a line that was broken off, as by a full disk
            left.unreadable += 1
            continue
        chain, is_whole = chains.of(entry)
        if not entry.sampled or "first_byte" not in entry.ms or not entry.prompt_tokens or entry.outcome == "refused":
            left.not_computed += 1
            continue
        left.models.add(entry.model or "")
        left.without_blocks += not chain
        left.without_beginning += not is_whole
        left.without_output += entry.output_tokens is None and entry.stream_events is None
        entry.blocks = ()  # the letters take a tenth of the memory
        yield _Request(entry=entry, prompt=entry.prompt_tokens, chain=alphabet.word(chain))


class _Chains:
    """Puts together the chains of blocks of which each line has only the new ones."""

    def __init__(self) -> None:
        self._before: dict[Hashable, Hashable | None] = {}

    def of(self, entry: AccessEntry) -> tuple[list[Hashable], bool]:
        """The blocks of a prompt, with its model; and whether the beginning is known, and not only that there was one.

        Prompts to several models may begin with the same tokens, and a line leaves out what any of them has brought.
        """
        known = self._before
        last: Hashable | None = entry.after
        is_whole = last is None or last in known
        if last is not None and not is_whole:
            self._invent(last, entry.shared_blocks)
        for each in entry.blocks:
            known.setdefault(each, last)
            last = each
        chain: list[Hashable] = []
        while last is not None:
            chain.append((entry.model, last))
            last = known[last]
        return chain[::-1], is_whole

    def _invent(self, last: Hashable, count: int) -> None:
        before: Hashable | None = None
        for number in range(count - 1):
            key = (last, number)
            self._before[key] = before
            before = key
        self._before[last] = before


def _turns(requests: Sequence[_Request], size: int, alphabet: Alphabet) -> list[Turn]:
    continued = _continuations(requests)
    reply = _median([length for each in requests if (length := _reply(each.entry)) is not None])
    start = requests[0].entry.at
    of_session: dict[str, list[int]] = {}
    turns = []
    for number, each in enumerate(requests):
        entry, sent = each.entry, each.entry.at - start
        earlier = [] if entry.session is None else of_session.setdefault(entry.session, [])
        ended = [one for one in earlier if requests[one].ended <= entry.at]
        after = max(ended, key=lambda one: requests[one].ended, default=None)
        earlier.append(number)
        length = _reply(entry) or reply
        full, later = each.prompt // size, continued[number]
        known = each.chain[:full]
        if later is not None and len(known) == full:
            known = later.chain
        elif len(known) < full:
            known = known + alphabet.new(full - len(known))  # nothing is known of the rest
        turns.append(
            Turn(
                session=entry.session or f"request-{number}",
                delay=sent if after is None else entry.at - requests[after].ended,
                after=after,
                prompt=each.prompt,
                reply=length,
                letters=filled(known, each.prompt, length, size, alphabet),
            )
        )
    return turns


def _continuations(requests: Sequence[_Request]) -> list[_Request | None]:
    """For each request, the first later one that was sent after its end, and whose prompt begins with its whole prompt."""
    found: list[_Request | None] = [None] * len(requests)
    waiting: dict[int, list[int]] = {}
    for number, each in enumerate(requests):
        for block in each.chain[:-1]:
            ready = waiting.get(block)
            if not ready:
                continue
            for one in ready:
                if requests[one].ended <= each.entry.at:
                    found[one] = each
            waiting[block] = [one for one in ready if found[one] is None]
        if each.chain:
            waiting.setdefault(each.chain[-1], []).append(number)
    return found


def _recorded(requests: Sequence[_Request]) -> dict[str, float | None]:
    """What engines reported and clients waited for, to compare a replay with.

    Hits are those of answers that report them, times those of streamed answers: others have no first token.
    """
    reporting = [each for each in requests if each.entry.cached_tokens is not None]
    prompt = sum(each.prompt for each in reporting)
    waits = sorted(each.entry.ms["first_byte"] / 1000 for each in requests if each.entry.stream_events)
    return {
        "hit_rate": round(sum(each.entry.cached_tokens or 0 for each in reporting) / prompt, 4) if prompt else None,
        "ttft_mean_s": float(f"{sum(waits) / len(waits):.4g}") if waits else None,
        "ttft_p90_s": float(f"{waits[int(len(waits) * 0.9)]:.4g}") if waits else None,
    }


def _reply(entry: AccessEntry) -> int | None:
    """Tokens of the answer: as reported, or about one for each event of a stream, whose last event says that it is over."""
    if entry.output_tokens is not None:
        return max(1, entry.output_tokens)
    return None if entry.stream_events is None else max(1, entry.stream_events - 1)


def _median(lengths: Sequence[int]) -> int:
    return sorted(lengths)[len(lengths) // 2] if lengths else 1
