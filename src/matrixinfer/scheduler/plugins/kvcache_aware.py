"""`kvcache-aware`: prefers pods that already hold the prompt's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from msgspec import Meta

from matrixinfer.blocks import Scheme
from matrixinfer.config import Count, Section, described
from matrixinfer.errors import PluginError
from matrixinfer.scheduler.framework import Candidate, Plugin, SchedulingRequest, Scores, Services


class KvCacheAware(Plugin):
    """Scores the blocks that a pod holds from the prompt's start, without a gap, as a share of the blocks that count.

    Pending blocks, which requests in flight bring to a pod, count as held. Blocks on slower tiers, blocks whose events
    are in doubt, and blocks that were sent lately to a pod without reliable events get less credit
    (`scheduler.weights`). The prompt's full blocks count, up to `maxBlocksToMatch`; where token ids are unknown, their
    number is estimated, and what was sent lately is recognised by the prompt's bytes. A prompt without a full block scores
    0 at every pod, and so does a prompt that is no longer than one block of every engine.
    """

    name: ClassVar[str] = "kvcache-aware"

    class Args(Section, frozen=True):
        """How many blocks count. The block size and the hash scheme are those of the whole gateway: see `blocks`."""

        block_size_to_hash: Annotated[
            Count | None, described("Alias of `blocks.size`. If both are given, they must be equal.")
        ] = None
        max_blocks_to_match: Annotated[
            int, Meta(ge=0), described("At most this many blocks count, from the prompt's start; 0 counts all.")
        ] = 128
        hash_scheme: Annotated[
            Scheme | None, described("Alias of `blocks.scheme`. If both are given, they must be equal.")
        ] = None

    def __init__(self, args: Args, services: Services) -> None:
        if args.block_size_to_hash is not None or args.hash_scheme is not None:
            raise PluginError(
                "loading resolves these aliases; a configuration made in code sets `Config.blocks` instead"
            )
        self._max_blocks = args.max_blocks_to_match

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Scores:
        blocks = len(request.chain)
        if request.unknown_tokens:
            blocks = max(blocks, request.whole_tokens // request.block_size)
        considered = min(blocks, self._max_blocks) if self._max_blocks else blocks
        if considered == 0:
            return Scores(values=[0.0] * len(candidates), note=_why_no_blocks(request))
        if _is_too_short(request, candidates):
            note = (
                f"no engine can find the prompt's {request.whole_tokens} tokens in its cache: they fit into one block"
            )
            return Scores(values=[0.0] * len(candidates), note=note)
        values = [100.0 * min(pod.credit, considered) / considered for pod in candidates]
        return Scores(values=values, note=_what_is_unknown(candidates))


def _what_is_unknown(candidates: Sequence[Candidate]) -> str | None:
    notes = []
    unknown = [pod.matched_blocks for pod in candidates].count(None)
    if unknown:
        notes.append(f"the index could not say what {unknown} of {len(candidates)} pods hold")
    for trust in ("partial", "stale"):
        doubtful = sum(pod.matched_blocks is not None and pod.trust == trust for pod in candidates)
        if doubtful:
            notes.append(f"what the index says of {doubtful} of {len(candidates)} pods is {trust}")
    return "; ".join(notes) or None


def _is_too_short(request: SchedulingRequest, candidates: Sequence[Candidate]) -> bool:
    """Whether no engine can have a hit: engines find only whole blocks, and never the last token."""
    tokens = request.whole_tokens
    if request.prompt_tokens is None:
        return False
    return all(pod.engine_block is not None and tokens <= pod.engine_block for pod in candidates)


def _why_no_blocks(request: SchedulingRequest) -> str:
    if request.unknown_tokens:
        return f"the prompt's tokens, estimated at {request.whole_tokens}, are fewer than one block of {request.block_size}"
    if request.prompt_tokens is None:
        return "the prompt was not tokenized"
    if request.prompt_tokens < request.block_size:
        return f"the prompt's {request.prompt_tokens} tokens are fewer than one block of {request.block_size}"
    return "the prompt has no block that an index could know"
