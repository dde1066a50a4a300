"""Finds a sampled prompt's token ids among the blocks that its engine stores.

The engine's events do not say which request a block belongs to, and they come late. So every request that an endpoint
computes is noted here, for as long as its events may still come. A chain of blocks that begins where the sample's must
begin is the sample's own only if no other of these requests explains it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from matrixinfer.blocks import TokenIds, token_bytes
from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.kvevents.witness import Witness

Outcome: TypeAlias = Literal["agrees", "differs", "inconclusive"]

_MAX_SAMPLES = 64
_MAX_PRESENT = 256
"""Limit of requests noted for one endpoint. While there are more, nothing is held against a sample."""
_HEAD = 8
"""Chains and prompts are compared only if their first tokens, this many, are the same."""
_GRACE_SECONDS = 1.0
_SWEEP_SECONDS = 0.1
"""How long after an answer's end its events may still come."""


@dataclass(slots=True, kw_only=True, eq=False)
class Present:
    """A request that an endpoint computes, or has computed so lately that its events may still come."""

    model: str
    """The index's name of the model at the endpoint."""
    ids: TokenIds | None
    """None if they are not known."""
    until: float | None = None
    """When its events have surely come; None while it is in flight."""


@dataclass(slots=True, kw_only=True, eq=False)
class Sample:
    """A request whose blocks are being looked for in the events of the endpoint that computes it."""

    model: str
    request_class: str
    pod: str
    path: str
    feed: PodFeed
    epoch: int
    """The feed's epoch when the sample began: in a later one, old blocks may have been published again."""
    witness: Witness
    rivals: list[Present]
    """The other requests that were present at any time since the sample began."""
    blind: bool
    """More requests were present than are noted."""
    until: float | None = None
    """When to judge it; None while the request is in flight."""
    void: bool = False

    def outcome(self) -> tuple[Outcome, int | None]:
        """Whether the engine's ids are ours, and the first position that differs if not."""
        witness = self.witness
        if self.void or self.feed.epoch != self.epoch or not witness.chains:
            return "inconclusive", None
        rivals = [each.ids for each in self.rivals if each.model == witness.model]
        known = [ids for ids in rivals if ids is not None and _may_follow(ids, witness)]
        if witness.equal is not None:
            mine = not any(witness.is_of(witness.equal, ids) for ids in known)
            return ("agrees" if mine else "inconclusive"), None
        if self.blind or any(ids is None for ids in rivals):
            return "inconclusive", None
        strange, unseen = _unexplained(witness, known)
        # Our own chain was not seen. It is a strange one if each that is missing is there, or if it must have begun here
        # because no other request can have brought more of our prompt than was known.
        if not strange or not (len(strange) == 1 + unseen or self._begins_here(known)):
            return "inconclusive", None
        return "differs", max(at for chain in strange if (at := witness.difference(chain)) is not None)

    def _begins_here(self, others: Sequence[TokenIds]) -> bool:
        """Whether none of `others` has the next engine block of our prompt."""
        start, size = self.witness.held, self.feed.ledger.block_size or 1
        ours = self.witness.ids[start : start + size]
        return not any(np.array_equal(ids[start : start + size], ours) for ids in others)


def _unexplained(witness: Witness, others: Sequence[TokenIds]) -> tuple[list[bytes], int]:
    """The strange chains that none of `others` explains, and how many of these have not been seen."""
    by_head: dict[bytes, list[int]] = {}
    for i, ids in enumerate(others):
        by_head.setdefault(token_bytes(ids[witness.held : witness.held + _HEAD]), []).append(i)
    short = [i for head, them in by_head.items() if len(head) < 4 * _HEAD for i in them]
    unseen = set(range(len(others)))
    strange: list[bytes] = []
    for chain in witness.strange:
        explained = [i for i in (*by_head.get(chain[: 4 * _HEAD], ()), *short) if witness.is_of(chain, others[i])]
        unseen.difference_update(explained)
        if not explained:
            strange.append(chain)
    return strange, len(unseen)


@dataclass(slots=True, eq=False)
class _Presence:
    entries: deque[Present] = field(default_factory=deque)
    blind: bool = False
    swept_at: float = float("-inf")


class Sampling:
    """The samples, and the requests that are present. `clock` gives seconds; `judged` is called for every sample."""

    def __init__(self, clock: Callable[[], float], judged: Callable[[Sample], None]) -> None:
        self._clock = clock
        self._judged = judged
        self._present: dict[PodFeed, _Presence] = {}
        self._samples: dict[PodFeed, Sample] = {}

    def __len__(self) -> int:
        """Requests being looked for in events."""
        return len(self._samples)

    def enter(self, feed: PodFeed, model: str, ids: TokenIds | None) -> Present:
        """A request goes to the endpoint of `feed`; `leave` must follow."""
        entry = Present(model=model, ids=ids)
        presence = self._present.setdefault(feed, _Presence())
        self._forget_gone(feed, presence)
        if len(presence.entries) >= _MAX_PRESENT:
            presence.blind = True
        else:
            presence.entries.append(entry)
        sample = self._samples.get(feed)
        if sample is not None and len(sample.rivals) < _MAX_PRESENT:
            sample.rivals.append(entry)
        elif sample is not None:
            sample.blind = True
        self._present[feed] = presence
        return entry

    def leave(self, entry: Present) -> None:
        """The request is over. Its last events may still come."""
        entry.until = self._clock() + _GRACE_SECONDS

    def can_watch(self, feed: PodFeed) -> bool:
        """Whether a sample could be looked for in `feed` now."""
        self.settle()
        return feed not in self._samples and not feed.ledger.is_observed and len(self._samples) < _MAX_SAMPLES

    def watch(
        self, feed: PodFeed, witness: Witness, own: Present, *, model: str, request_class: str, pod: str, path: str
    ) -> Sample | None:
        """Look for the prompt of `witness`, present as `own`, in the blocks that are stored from now on."""
        if not self.can_watch(feed):
            return None
        presence = self._present.get(feed, _Presence())
        sample = self._samples[feed] = Sample(
            model=model,
            request_class=request_class,
            pod=pod,
            path=path,
            feed=feed,
            epoch=feed.epoch,
            witness=witness,
            rivals=[each for each in presence.entries if each is not own],
            blind=presence.blind,
        )
        feed.ledger.observe(witness)
        return sample

    def finished(self, sample: Sample, *, computed: bool) -> None:
        """The request of `sample` is over."""
        sample.void = sample.void or not computed
        sample.until = self._clock() + (_GRACE_SECONDS if computed else 0.0)

    def settle(self) -> None:
        """Judge the samples that are due."""
        now = self._clock()
        for feed, sample in list(self._samples.items()):
            if sample.until is not None and sample.until <= now:
                del self._samples[feed]
                feed.ledger.stop_observing(sample.witness)
                self._judged(sample)

    def forget_gone(self) -> None:
        """Forget requests whose events have come, of all endpoints."""
        for feed, presence in list(self._present.items()):
            self._forget_gone(feed, presence)

    def _forget_gone(self, feed: PodFeed, presence: _Presence) -> None:
        now, entries = self._clock(), presence.entries
        while entries and (until := entries[0].until) is not None and until <= now:
            entries.popleft()
        if len(entries) >= _MAX_PRESENT and now >= presence.swept_at + _SWEEP_SECONDS:
            # A long request at the front holds up those behind it.
            presence.swept_at = now
            presence.entries = entries = deque(each for each in entries if each.until is None or each.until > now)
        if not entries:
            presence.blind = False
            self._present.pop(feed, None)


def _may_follow(ids: TokenIds, witness: Witness) -> bool:
    """Whether another prompt can continue from the place where the sample's new blocks begin."""
    return np.array_equal(ids[: witness.held], witness.ids[: witness.held])
