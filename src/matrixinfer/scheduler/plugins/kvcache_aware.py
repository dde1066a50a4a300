"""`kvcache-aware`: prefers pods that already hold the prompt's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from msgspec import Meta

from matrixinfer.blocks import Scheme
from matrixinfer.config import Count, Section, described
from matrixinfer.errors import PluginError
from matrixinfer.scheduler.framework import Candidate, Plugin, SchedulingRequest, Scores, Services
from matrixinfer.scheduler.match_notes import is_too_short, too_short, what_is_unknown, why_no_blocks


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
            return Scores(values=[0.0] * len(candidates), note=why_no_blocks(request))
        if is_too_short(request, candidates):
            return Scores(values=[0.0] * len(candidates), note=too_short(request))
        values = [100.0 * min(pod.credit, considered) / considered for pod in candidates]
        return Scores(values=values, note=what_is_unknown(candidates))
