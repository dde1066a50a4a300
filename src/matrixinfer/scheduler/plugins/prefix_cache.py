"""`prefix-cache`: guesses which pod holds a prompt by where its beginning was sent before. Needs no events or tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import islice
from typing import Annotated, ClassVar, TypeAlias

from matrixinfer.config import Count, Section, described
from matrixinfer.scheduler.framework import Candidate, Decision, Plugin, SchedulingRequest, Scores, Services

_Pods: TypeAlias = frozenset[str]


class PrefixCache(Plugin):
    """Scores the blocks of the prompt's bytes that were sent to a pod before, as a share of all its full blocks.

    Only blocks from the prompt's start, without a gap, count. The plugin remembers routes, not caches: it cannot see
    evictions, restarts or what other gateways send.
    """

    name: ClassVar[str] = "prefix-cache"

    class Args(Section, frozen=True):
        """How much is remembered of past prompts."""

        block_bytes: Annotated[Count, described("Bytes of the prompt per block.")] = 512
        max_blocks_to_match: Annotated[
            Count, described("At most this many blocks count, from the prompt's start. Bounds the time of a decision.")
        ] = 2048
        max_blocks: Annotated[
            Count,
            described(
                "Most blocks remembered. Beyond it, the least recently routed are forgotten, ends of prompts first."
            ),
        ] = 1_000_000

    def __init__(self, args: Args, services: Services) -> None:
        self._block_bytes = args.block_bytes
        self._max_blocks_to_match = args.max_blocks_to_match
        self._max_blocks = args.max_blocks
        # Oldest first. Neighbouring blocks of a prompt mostly went to the same pods; they share one set.
        self._sent: OrderedDict[int, _Pods] = OrderedDict()

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Scores:
        total = self._blocks(request)
        if total == 0:
            note = f"the prompt's {len(request.prefix)} bytes are fewer than one block of {self._block_bytes}"
            return Scores(values=[0.0] * len(candidates), note=note)
        matched = self._matched(request, _Pods(pod.name for pod in candidates))
        return Scores(values=[100.0 * matched.get(pod.name, 0) / total for pod in candidates])

    def post_schedule(self, request: SchedulingRequest, decision: Decision) -> None:
        """Remember that the chosen pod holds the prompt, and drop pods that have gone from the prompt's blocks."""
        here = _Pods(pod.name for pod in decision.candidates)
        chosen = _Pods((decision.chosen.name,))
        before: _Pods | None = None
        after = chosen
        # From the end to the start: a block stays younger than those that follow it, so ends of prompts are dropped first.
        for block in reversed(list(self._chain(request))):
            known = self._sent.get(block)
            if known is not before:
                before = known
                after = chosen if known is None else (known & here) | chosen
            self._sent[block] = after
            self._sent.move_to_end(block)
        while len(self._sent) > self._max_blocks:
            self._sent.popitem(last=False)

    def _matched(self, request: SchedulingRequest, pods: _Pods) -> dict[str, int]:
        """Number of known blocks from the prompt's start, without a gap, per pod. Pods without one may be absent."""
        matched: dict[str, int] = {}
        alive = pods
        last: _Pods | None = None
        count = 0
        for block in self._chain(request):
            sent = self._sent.get(block)
            if sent is None:
                break
            if sent is not last:
                last = sent
                matched.update(dict.fromkeys(alive - sent, count))
                alive &= sent
                if not alive:
                    break
            count += 1
        matched.update(dict.fromkeys(alive, count))
        return matched

    def _blocks(self, request: SchedulingRequest) -> int:
        return min(len(request.prefix) // self._block_bytes, self._max_blocks_to_match)

    def _chain(self, request: SchedulingRequest) -> Iterator[int]:
        """Hashes of the full blocks. Each covers the model and everything before the block."""
        parent = sha256(request.model.encode()).digest()[:8]
        view = memoryview(request.prefix)
        for start in islice(range(0, len(view), self._block_bytes), self._blocks(request)):
            state = sha256(parent)
            state.update(view[start : start + self._block_bytes])
            parent = state.digest()[:8]
            yield int.from_bytes(parent, "big")
