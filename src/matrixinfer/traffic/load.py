"""Tracks the requests that this gateway has in flight at each pod: their load and their pending blocks.

Pending blocks that other gateways report count as well, for a limited time (`LoadLedger.add_pending`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

_DELETED_PER_CHARGE = 64
"""Expired blocks to delete per charge, besides two for each new block, so that deletion outpaces growth."""


OnCharge: TypeAlias = Callable[[str, str, Sequence[int], int, "Charge"], None]
"""Arguments: pod, model, hashes and start as passed to `LoadLedger.charge`, and the charge."""


class LoadLedger:
    """Per pod: the requests in flight, the prompt tokens they still have to compute, and their pending blocks.

    A block is pending at a pod while a request that brings it is in flight there, and for `pending_seconds` after
    that; by then the engine's events have reported it. `clock` returns seconds and is monotonic. The ledger keeps at
    most `max_pending_blocks` blocks, counted per request; beyond that, requests are charged without their blocks.
    """

    def __init__(
        self, clock: Callable[[], float], pending_seconds: float, *, max_pending_blocks: int = 1_000_000
    ) -> None:
        self._clock = clock
        self._pending_seconds = pending_seconds
        self._max_pending_blocks = max_pending_blocks
        self._pods: dict[str, _PodLoad] = {}
        self._pending: dict[tuple[str, str], _Pending] = {}
        self._fading: deque[tuple[float, _Pending, list[int]]] = deque()
        self._stored_blocks = 0
        self._subscribers: list[OnCharge] = []

    def subscribe(self, on_charge: OnCharge) -> Callable[[], None]:
        """Call `on_charge` for each charged request that brings blocks. Returns a function that unsubscribes."""
        self._subscribers.append(on_charge)
        return lambda: self._subscribers.remove(on_charge)

    def charge(
        self,
        pod: str,
        model: str,
        *,
        hashes: Sequence[int],
        start: int,
        queued_tokens: int,
        chunks: Sequence[int] = (),
    ) -> Charge:
        """Count a request that is sent to `pod` now.

        `hashes` is the prompt's chain. The index matched its first `start` blocks; the rest become pending at the pod,
        and so do the `chunks` of its bytes, if not all of its token ids are known. `queued_tokens` is the number of prompt
        tokens that the pod must compute.
        """
        wanted = max(0, len(hashes) - start)
        self._delete_expired(2 * (wanted + len(chunks)) + _DELETED_PER_CHARGE)
        count = min(wanted, self._max_pending_blocks - self._stored_blocks)
        blocks = list(hashes[start : start + count]) if count else []
        if chunks:
            blocks += chunks[: self._max_pending_blocks - self._stored_blocks - len(blocks)]
        load = self._pods.setdefault(pod, _PodLoad())
        load.in_flight += 1
        load.queued_tokens += queued_tokens
        pending = None
        if blocks:
            self._stored_blocks += len(blocks)
            pending = self._pending.setdefault((pod, model), _Pending((pod, model)))
            pending.add(blocks)
        charge = Charge(self, pod, load, pending, blocks, queued_tokens)
        try:
            for on_charge in self._subscribers if wanted else ():
                on_charge(pod, model, hashes, start, charge)
            for on_charge in self._subscribers if chunks else ():
                on_charge(pod, model, chunks, 0, charge)
        except BaseException:
            charge.cancel()  # the caller never gets it
            raise
        return charge

    def add_pending(self, pod: str, model: str, hashes: Sequence[int]) -> None:
        """Make `hashes` pending at `pod` for `pending_seconds` from now: a request of another gateway brings them."""
        self._delete_expired(2 * len(hashes) + _DELETED_PER_CHARGE)
        blocks = list(hashes[: self._max_pending_blocks - self._stored_blocks])
        if not blocks:
            return
        self._stored_blocks += len(blocks)
        pending = self._pending.setdefault((pod, model), _Pending((pod, model)))
        pending.add(blocks)
        self._fade(pending, blocks)

    def in_flight(self, pod: str) -> int:
        """Number of requests in flight at `pod`."""
        load = self._pods.get(pod)
        return 0 if load is None else load.in_flight

    def queued_tokens(self, pod: str) -> int:
        """Prompt tokens of the requests at `pod` that have not received their first byte."""
        load = self._pods.get(pod)
        return 0 if load is None else load.queued_tokens

    def loads(self) -> dict[str, tuple[int, int]]:
        """Requests in flight and queued tokens of each pod that has requests in flight."""
        return {pod: (load.in_flight, load.queued_tokens) for pod, load in self._pods.items()}

    def total(self) -> int:
        """Number of requests in flight at all pods."""
        return sum(load.in_flight for load in self._pods.values())

    def __len__(self) -> int:
        """Number of stored blocks, counted per request. Later requests delete expired ones."""
        return self._stored_blocks

    def pending(self, pod: str, model: str, hashes: Sequence[int], start: int, *, whole_prompts: bool = False) -> int:
        """How many consecutive blocks from position `start` on are pending at `pod`.

        With `whole_prompts`, up to where a prompt ends that is pending there: an engine that does not reuse every prefix
        that it holds will reuse that one. Reads `hashes` only if any block is pending there. The search is exponential,
        then binary.
        """
        pending = self._pending.get((pod, model))
        if pending is None:
            return 0
        count = pending.count(hashes, start, self._clock())
        return pending.ends_within(hashes, start, count, self._clock()) if whole_prompts else count

    def forget(self, pod: str) -> None:
        """Delete all data of `pod`, which has gone. Charges that are still open there no longer count."""
        self._pods.pop(pod, None)
        for key in [key for key in self._pending if key[0] == pod]:
            del self._pending[key]
        fading = [each for each in self._fading if each[1].key[0] == pod]
        if fading:
            self._stored_blocks -= sum(len(blocks) for _, _, blocks in fading)
            self._fading = deque(each for each in self._fading if each[1].key[0] != pod)

    def _release(
        self, pod: str, load: _PodLoad, pending: _Pending | None, blocks: list[int], *, computed: bool
    ) -> None:
        load.in_flight -= 1
        if load.in_flight == 0 and self._pods.get(pod) is load:
            del self._pods[pod]
        if pending is None:
            return
        if computed:
            self._fade(pending, blocks)
        else:
            pending.release(blocks)
            self._stored_blocks -= len(blocks)
            self._drop_if_empty(pending)

    def _fade(self, pending: _Pending, blocks: list[int]) -> None:
        until = self._clock() + self._pending_seconds
        pending.fade(blocks, until)
        self._fading.append((until, pending, blocks))

    def _drop_if_empty(self, pending: _Pending) -> None:
        if pending.empty and self._pending.get(pending.key) is pending:
            del self._pending[pending.key]

    def _delete_expired(self, budget: int) -> None:
        """Delete up to `budget` expired blocks. This frees memory; lookups ignore expired blocks anyway."""
        now = self._clock()
        while self._fading and budget > 0:
            until, pending, blocks = self._fading[0]
            if until > now:
                return
            gone = blocks[-budget:]
            del blocks[-budget:]
            budget -= len(gone)
            self._stored_blocks -= len(gone)
            pending.drop(gone, until)
            if blocks:
                return
            self._fading.popleft()
            self._drop_if_empty(pending)


class Charge:
    """The share of one request in a pod's load. Its methods may be called at any time, any number of times."""

    __slots__ = ("_blocks", "_ledger", "_load", "_pending", "_pod", "_queued_tokens", "_released", "awaits_first_byte")

    def __init__(
        self,
        ledger: LoadLedger,
        pod: str,
        load: _PodLoad,
        pending: _Pending | None,
        blocks: list[int],
        queued_tokens: int,
    ) -> None:
        self._ledger = ledger
        self._pod = pod
        self._load = load
        self._pending = pending
        self._blocks = blocks
        self._queued_tokens = queued_tokens
        self._released = False
        self.awaits_first_byte = True
        """True until the answer begins."""

    def first_byte(self) -> None:
        """Record that the answer has begun, so the prompt has been computed."""
        self._load.queued_tokens -= self._queued_tokens
        self._queued_tokens = 0
        self.awaits_first_byte = False

    def release(self) -> None:
        """End the charge: the request is over, and the pod has computed its prompt."""
        self._end(computed=True)

    def cancel(self) -> None:
        """End the charge of a request whose prompt the pod did not compute: its blocks stop being pending at once."""
        self._end(computed=False)

    def _end(self, *, computed: bool) -> None:
        if self._released:
            return
        self._released = True
        self.first_byte()
        self._ledger._release(self._pod, self._load, self._pending, self._blocks, computed=computed)  # noqa: SLF001


class _PodLoad:
    """Totals over one pod's open charges."""

    __slots__ = ("in_flight", "queued_tokens")

    def __init__(self) -> None:
        self.in_flight = 0
        self.queued_tokens = 0


class _Pending:
    """The pending blocks of one model at one pod: of requests in flight, and fading ones of requests that have ended."""

    __slots__ = ("_ends", "_fading", "_held", "_until", "key")

    def __init__(self, key: tuple[str, str], *, has_ends: bool = True) -> None:
        self.key = key
        self._ends = _Pending(key, has_ends=False) if has_ends else None
        """The last block of each request."""
        self._held: dict[int, int] = {}
        self._fading: dict[int, float] = {}
        self._until = float("-inf")

    @property
    def empty(self) -> bool:
        return not self._held and not self._fading

    def add(self, blocks: list[int]) -> None:
        held = self._held
        for block in blocks:
            held[block] = held.get(block, 0) + 1
        if self._ends is not None:
            self._ends.add(blocks[-1:])

    def release(self, blocks: list[int]) -> None:
        """Remove one request's `blocks`; they do not fade."""
        held = self._held
        for block in blocks:
            if held[block] > 1:
                held[block] -= 1
            else:
                del held[block]
        if self._ends is not None:
            self._ends.release(blocks[-1:])

    def fade(self, blocks: list[int], until: float) -> None:
        """Remove one request's `blocks`, which stay pending until `until`. `until` must not decrease between calls."""
        held = self._held
        for block in blocks:
            if held[block] > 1:
                held[block] -= 1
            else:
                del held[block]
                self._fading[block] = until
        self._until = until
        if self._ends is not None:
            self._ends.fade(blocks[-1:], until)

    def drop(self, blocks: list[int], until: float) -> None:
        """Delete those of `blocks` that expire at `until`, and not later because another request brought them."""
        for block in blocks:
            if self._fading.get(block) == until:
                del self._fading[block]
        if self._ends is not None:
            self._ends.drop(blocks[-1:], until)

    def ends_within(self, hashes: Sequence[int], start: int, count: int, now: float) -> int:
        """How many of `count` pending blocks from `start` on there are up to the last one that ends a request."""
        ends = self._ends
        if ends is None:
            return 0
        return next((n for n in range(count, 0, -1) if ends.count(hashes[start + n - 1 : start + n], 0, now)), 0)

    def count(self, hashes: Sequence[int], start: int, now: float) -> int:
        fading = self._fading if self._until > now else {}
        if not self._held and not fading:
            return 0

        def is_pending(position: int) -> bool:
            block = hashes[position]
            return block in self._held or fading.get(block, now) > now

        if start >= len(hashes) or not is_pending(start):
            return 0
        # Requests bring whole chains, so the pending blocks normally form one run. (If the index has since lost blocks
        # that an earlier request built on, there may be gaps, and the result is an estimate.) Exponential search for
        # the end of the run, then bisection.
        last, step, end = start, 1, len(hashes)
        while last + step < end and is_pending(last + step):
            last += step
            step *= 2
        end = min(end, last + step)
        while end - last > 1:
            middle = (last + end) // 2
            if is_pending(middle):
                last = middle
            else:
                end = middle
        return end - start
