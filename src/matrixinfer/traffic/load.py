"""What this gateway has sent to each pod and has not seen finished: the load and the prefixes that are on their way.

Prefixes that other gateways tell of count as well, for some time (`LoadLedger.add_pending`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

_DRAINED_PER_CHARGE = 64
"""Faded blocks forgotten per charge, beyond twice those it brings: what fades is forgotten faster than it comes."""


class LoadLedger:
    """Requests in flight per pod, prompt tokens that they have yet to compute, and the blocks they are bringing.

    A block counts as pending at a pod while a request that brings it is in flight there, and for `pending_seconds`
    after; by then the engine's events say whether it is there. `clock` gives seconds and never goes back. At most
    `max_pending_blocks` blocks are remembered, counted per request; further requests are charged without theirs.
    """

    def __init__(
        self, clock: Callable[[], float], pending_seconds: float, *, max_pending_blocks: int = 1_000_000
    ) -> None:
        self._clock = clock
        self._assumed_seconds = pending_seconds
        self._max_assumed_blocks = max_pending_blocks
        self._pods: dict[str, _PodLoad] = {}
        self._pending: dict[tuple[str, str], _Pending] = {}
        self._fading: deque[tuple[float, _Pending, list[int]]] = deque()
        self._remembered = 0
        self.on_charge: Callable[[str, str, Sequence[int], int, Charge], None] | None = None
        """Told of each request that brings blocks: pod, model, hashes and start as charged, and its charge."""

    def charge(self, pod: str, model: str, *, hashes: Sequence[int], start: int, queued_tokens: int) -> Charge:
        """Count a request that goes to `pod` now.

        `hashes` is the prompt's chain, of which the pod's index match covers `start` blocks; the rest is pending at the
        pod. `queued_tokens` are the prompt tokens that the pod must compute.
        """
        wanted = max(0, len(hashes) - start)
        self._drain(2 * wanted + _DRAINED_PER_CHARGE)
        count = min(wanted, self._max_assumed_blocks - self._remembered)
        blocks = list(hashes[start : start + count]) if count else []
        load = self._pods.setdefault(pod, _PodLoad())
        load.in_flight += 1
        load.queued_tokens += queued_tokens
        pending = None
        if blocks:
            self._remembered += len(blocks)
            pending = self._pending.setdefault((pod, model), _Pending((pod, model)))
            pending.hold(blocks)
        charge = Charge(self, pod, load, pending, blocks, queued_tokens)
        if wanted and self.on_charge is not None:
            self.on_charge(pod, model, hashes, start, charge)
        return charge

    def add_pending(self, pod: str, model: str, hashes: Sequence[int]) -> None:
        """Take `hashes` for what a request elsewhere is bringing to `pod`, for `pending_seconds` from now on."""
        self._drain(2 * len(hashes) + _DRAINED_PER_CHARGE)
        blocks = list(hashes[: self._max_assumed_blocks - self._remembered])
        if not blocks:
            return
        self._remembered += len(blocks)
        pending = self._pending.setdefault((pod, model), _Pending((pod, model)))
        pending.hold(blocks)
        self._let_fade(pending, blocks)

    def in_flight(self, pod: str) -> int:
        """Count the requests in flight at `pod`."""
        load = self._pods.get(pod)
        return 0 if load is None else load.in_flight

    def queued_tokens(self, pod: str) -> int:
        """Sum the prompt tokens of requests at `pod` whose first byte has not come."""
        load = self._pods.get(pod)
        return 0 if load is None else load.queued_tokens

    def loads(self) -> dict[str, tuple[int, int]]:
        """Requests in flight and queued tokens of each pod that has any."""
        return {pod: (load.in_flight, load.queued_tokens) for pod, load in self._pods.items()}

    def total(self) -> int:
        """Count the requests in flight at all pods."""
        return sum(load.in_flight for load in self._pods.values())

    def __len__(self) -> int:
        """Blocks remembered, counted per request; those whose time is over go with later requests."""
        return self._remembered

    def pending(self, pod: str, model: str, hashes: Sequence[int], start: int) -> int:
        """Count the further consecutive blocks, from position `start` on, that are pending at `pod`.

        Reads `hashes` only where something is pending, and no further than the first block that is not.
        """
        pending = self._pending.get((pod, model))
        return 0 if pending is None else pending.count(hashes, start, self._clock())

    def forget(self, pod: str) -> None:
        """Drop all about `pod`, which is gone. Charges still open there count nowhere any more."""
        self._pods.pop(pod, None)
        for key in [key for key in self._pending if key[0] == pod]:
            del self._pending[key]
        fading = [each for each in self._fading if each[1].key[0] == pod]
        if fading:
            self._remembered -= sum(len(blocks) for _, _, blocks in fading)
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
            self._let_fade(pending, blocks)
        else:
            pending.let_go(blocks)
            self._remembered -= len(blocks)
            self._drop_if_empty(pending)

    def _let_fade(self, pending: _Pending, blocks: list[int]) -> None:
        until = self._clock() + self._assumed_seconds
        pending.fade(blocks, until)
        self._fading.append((until, pending, blocks))

    def _drop_if_empty(self, pending: _Pending) -> None:
        if pending.empty and self._pending.get(pending.key) is pending:
            del self._pending[pending.key]

    def _drain(self, budget: int) -> None:
        """Forget up to `budget` blocks whose time is over. Look-ups do not depend on it, memory does."""
        now = self._clock()
        while self._fading and budget > 0:
            until, pending, blocks = self._fading[0]
            if until > now:
                return
            gone = blocks[-budget:]
            del blocks[-budget:]
            budget -= len(gone)
            self._remembered -= len(gone)
            pending.drop(gone, until)
            if blocks:
                return
            self._fading.popleft()
            self._drop_if_empty(pending)


class Charge:
    """One request's hold on a pod. Its methods may be called at any time, any number of times."""

    __slots__ = ("_blocks", "_ledger", "_load", "_pending", "_pod", "_queued_tokens", "_released", "waits")

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
        self.waits = True
        """Whether the answer has yet to begin."""

    def first_byte(self) -> None:
        """Note that the answer began, so the prompt is computed."""
        self._load.queued_tokens -= self._queued_tokens
        self._queued_tokens = 0
        self.waits = False

    def release(self) -> None:
        """End the hold: the request is over, and its prompt was computed."""
        self._end(computed=True)

    def cancel(self) -> None:
        """End the hold of a request that the pod did not compute: it leaves nothing there."""
        self._end(computed=False)

    def _end(self, *, computed: bool) -> None:
        if self._released:
            return
        self._released = True
        self.first_byte()
        self._ledger._release(self._pod, self._load, self._pending, self._blocks, computed=computed)  # noqa: SLF001


class _PodLoad:
    """Sums over one pod's open charges."""

    __slots__ = ("in_flight", "queued_tokens")

    def __init__(self) -> None:
        self.in_flight = 0
        self.queued_tokens = 0


class _Pending:
    """The blocks of one model that are pending at one pod: held by requests in flight, or fading after them."""

    __slots__ = ("_fading", "_held", "_until", "key")

    def __init__(self, key: tuple[str, str]) -> None:
        self.key = key
        self._held: dict[int, int] = {}
        self._fading: dict[int, float] = {}
        self._until = float("-inf")

    @property
    def empty(self) -> bool:
        return not self._held and not self._fading

    def hold(self, blocks: list[int]) -> None:
        held = self._held
        for block in blocks:
            held[block] = held.get(block, 0) + 1

    def let_go(self, blocks: list[int]) -> None:
        """One request less holds `blocks`, and leaves nothing behind."""
        held = self._held
        for block in blocks:
            if held[block] > 1:
                held[block] -= 1
            else:
                del held[block]

    def fade(self, blocks: list[int], until: float) -> None:
        """One request less holds `blocks`. `until` never falls from call to call."""
        self.let_go(blocks)
        for block in blocks:
            if block not in self._held:
                self._fading[block] = until
        self._until = until

    def drop(self, blocks: list[int], until: float) -> None:
        """Forget those of `blocks` that did not fade again after `until`."""
        for block in blocks:
            if self._fading.get(block) == until:
                del self._fading[block]

    def count(self, hashes: Sequence[int], start: int, now: float) -> int:
        fading = self._fading if self._until > now else {}
        if not self._held and not fading:
            return 0

        def there(position: int) -> bool:
            block = hashes[position]
            return block in self._held or fading.get(block, now) > now

        if start >= len(hashes) or not there(start):
            return 0
        # Requests bring whole chains, so what is there ends once (it may not where the index has since lost blocks that
        # an earlier request built on; then this is an estimate). Exponential search for the end, then bisection.
        last, step, end = start, 1, len(hashes)
        while last + step < end and there(last + step):
            last += step
            step *= 2
        end = min(end, last + step)
        while end - last > 1:
            middle = (last + end) // 2
            if there(middle):
                last = middle
            else:
                end = middle
        return end - start
