"""`prefix-cache`: prefers pods that a prompt's beginning was sent to before. Needs no events or tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from matrixinfer.config import Section
from matrixinfer.scheduler.framework import Candidate, Plugin, SchedulingRequest, Scores, Services


class PrefixCache(Plugin):
    """Scores the chunks of the prompt's bytes that were sent to a pod lately, as a share of all its chunks.

    Only chunks from the prompt's start, without a gap, count. A chunk is 512 bytes of text, or an image, audio or video
    with the text before it. Chunks are routes, not caches: they show no evictions.
    """

    name: ClassVar[str] = "prefix-cache"
    reads_bytes: ClassVar[bool] = True

    class Args(Section, frozen=True):
        """No arguments."""

    def __init__(self, args: Args, services: Services) -> None: ...

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Scores:
        total = len(request.chunks)
        if total == 0:
            note = f"the prompt's {len(request.prefix)} bytes are fewer than one chunk"
            return Scores(values=[0.0] * len(candidates), note=note)
        return Scores(values=[100.0 * min(pod.recent_chunks, total) / total for pod in candidates])
