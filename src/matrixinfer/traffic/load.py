"""Tracks the requests that this gateway has in flight at each pod: their load and their pending blocks.

Pending blocks that other gateways report count as well, for a limited time (`LoadLedger.add_pending`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

from matrixinfer.scheduler.prefill import prefill_work
from matrixinfer.traffic.arrivals import Arrivals
from matrixinfer.traffic.pending import Pending
from matrixinfer.traffic.pod_load import READING_SECONDS, PodLoad, View
from matrixinfer.traffic.speed import Speeds

_MAX_PODS = 10_000
_DELETED_PER_CHARGE = 64
"""Expired blocks to delete per charge, besides two for each new block, so that deletion outpaces growth."""
_NONE: Mapping[str, Pending] = MappingProxyType({})


OnCharge: TypeAlias = Callable[[str, str, Sequence[int], int, "Charge"], None]
"""Arguments: pod, model, hashes and start as passed to `LoadLedger.charge`, and the charge."""


class LoadLedger:
    """Per pod: the requests in flight, the prompt tokens they still have to compute, and their pending blocks.

    A block is pending at a pod while a request that brings it is in flight there, and for `pending_seconds` after
    that; by then the engine's events have reported it. If they report before that it has gone, it is pending no longer. `clock` returns seconds and is monotonic. The ledger keeps at
    most `max_pending_blocks` blocks, counted per request; beyond that, requests are charged without their blocks.
    """

    def __init__(
        self, clock: Callable[[], float], pending_seconds: float, *, max_pending_blocks: int = 1_000_000
    ) -> None:
        self._clock = clock
        self._pending_seconds = pending_seconds
        self._max_pending_blocks = max_pending_blocks
        self._speeds = Speeds()
        self.arrivals = Arrivals()
        self._pods: dict[str, PodLoad] = {}
        self._pending: dict[str, dict[str, Pending]] = {}  # by model and pod
        self._fading: deque[tuple[float, Pending, list[int]]] = deque()
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
        prompt_tokens: int | None = None,
        chunks: Sequence[int] = (),
        streams: bool = True,
    ) -> Charge:
        """Count a request that is sent to `pod` now.

        `hashes` is the prompt's chain. The index matched its first `start` blocks; the rest become pending at the pod,
        and so do the `chunks` of its bytes, if not all of its token ids are known. `queued_tokens` is the number of prompt
        tokens that the pod must compute, the last ones of a prompt of `prompt_tokens` if that is known. `streams`: the
        answer begins as soon as the prompt is computed.
        """
        now = self._clock()
        wanted = max(0, len(hashes) - start)
        self._delete_expired(2 * (wanted + len(chunks)) + _DELETED_PER_CHARGE, now)
        count = min(wanted, self._max_pending_blocks - self._stored_blocks)
        blocks = list(hashes[start : start + count]) if count else []
        if chunks:
            blocks += chunks[: self._max_pending_blocks - self._stored_blocks - len(blocks)]
        load, pending = self._load(pod), None
        if blocks:
            self._stored_blocks += len(blocks)
            pending = self._pending_of(pod, model)
            pending.add(blocks)
        charge = Charge(self, load, pending, blocks, queued_tokens, streams=streams, sent_at=now)
        work: float = queued_tokens
        if prompt_tokens is not None:
            work = prefill_work(queued_tokens, max(prompt_tokens, queued_tokens))
        load.began(charge, queued_tokens, work, now)
        self.arrivals.sent(work, now)
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
        self._delete_expired(2 * len(hashes) + _DELETED_PER_CHARGE, self._clock())
        blocks = list(hashes[: self._max_pending_blocks - self._stored_blocks])
        if not blocks:
            return
        self._stored_blocks += len(blocks)
        pending = self._pending_of(pod, model)
        pending.add(blocks)
        self._fade(pending, blocks)

    def gone(self, pod: str, model: str | None, blocks: Collection[int]) -> None:
        """`pod` has removed blocks of `model`; without a model it has lost everything.

        They are pending no longer, unless a request in flight brings them again.
        """
        if model is not None:
            pending = self.pending_at(model).get(pod)
            if pending is not None:
                pending.gone(blocks)
            return
        for pods in self._pending.values():
            if pod in pods:
                pods[pod].gone()

    def now(self) -> float:
        """The time, in seconds."""
        return self._clock()

    def in_flight(self, pod: str) -> int:
        """Number of requests in flight at `pod`."""
        load = self._pods.get(pod)
        return 0 if load is None else load.in_flight

    def queued_tokens(self, pod: str) -> int:
        """Prompt tokens of the requests at `pod` that have not received their first byte."""
        load = self._pods.get(pod)
        return 0 if load is None else load.queued_tokens

    def computed_tokens(self, pod: str) -> int:
        """Prompt tokens that `pod` has computed for requests from here since it is known."""
        load = self._pods.get(pod)
        return 0 if load is None else load.computed_tokens

    def loads(self) -> dict[str, tuple[int, int]]:
        """Requests in flight and queued tokens of each pod that has requests in flight."""
        return {pod: (load.in_flight, load.queued_tokens) for pod, load in self._pods.items() if load.in_flight}

    def view(self, pod: str, now: float) -> View:
        """The load of `pod` now, with the time that its queue will take."""
        load = self._pods.get(pod) or self._load(pod)
        known = load.known
        return known if known is not None and now < load.known_until else load.view(now)

    def most_in_flight(self, pod: str, at: float) -> int:
        """The most requests that were in flight at `pod` around a time, at which its engine's gauges were read."""
        load = self._pods.get(pod)
        return 0 if load is None else load.counts.most(at - READING_SECONDS, at + READING_SECONDS)

    def total(self) -> int:
        """Number of requests in flight at all pods."""
        return sum(load.in_flight for load in self._pods.values())

    def __len__(self) -> int:
        """Number of stored blocks, counted per request. Later requests delete expired ones."""
        return self._stored_blocks

    def pending_at(self, model: str) -> Mapping[str, Pending]:
        """The pending blocks of a model by pod. Pods without any are absent."""
        return self._pending.get(model, _NONE)

    def pending(self, pod: str, model: str, hashes: Sequence[int], start: int, *, whole_prompts: bool = False) -> int:
        """How many consecutive blocks from position `start` on are pending at `pod`.

        With `whole_prompts`, up to where a prompt ends that is pending there: an engine that does not reuse every prefix
        that it holds will reuse that one. Reads `hashes` only if any block is pending there. The search is exponential,
        then binary.
        """
        pending = self.pending_at(model).get(pod)
        if pending is None:
            return 0
        count = pending.count(hashes, start, self._clock())
        return pending.ends_within(hashes, start, count, self._clock()) if whole_prompts else count

    def forget(self, pod: str) -> None:
        """Delete all data of `pod`, which has gone. Charges that are still open there no longer count."""
        self._pods.pop(pod, None)
        for model in [model for model, pods in self._pending.items() if pod in pods]:
            self._drop(model, pod)
        fading = [each for each in self._fading if each[1].key[0] == pod]
        if fading:
            self._stored_blocks -= sum(len(blocks) for _, _, blocks in fading)
            self._fading = deque(each for each in self._fading if each[1].key[0] != pod)

    def _pending_of(self, pod: str, model: str) -> Pending:
        pods = self._pending.setdefault(model, {})
        pending = pods.get(pod)
        if pending is None:
            pending = pods[pod] = Pending((pod, model))
        return pending

    def _load(self, pod: str) -> PodLoad:
        load = self._pods.get(pod)
        if load is None:
            if len(self._pods) >= _MAX_PODS:
                self._pods = {name: each for name, each in self._pods.items() if each.in_flight}
            load = self._pods[pod] = PodLoad(self._speeds.new())
        return load

    def _release(self, pending: Pending | None, blocks: list[int], *, computed: bool) -> None:
        if pending is None:
            return
        if computed:
            self._fade(pending, blocks)
        else:
            pending.release(blocks)
            self._stored_blocks -= len(blocks)
            self._drop_if_empty(pending)

    def _fade(self, pending: Pending, blocks: list[int]) -> None:
        until = self._clock() + self._pending_seconds
        pending.fade(blocks, until)
        self._fading.append((until, pending, blocks))

    def _drop_if_empty(self, pending: Pending) -> None:
        pod, model = pending.key
        if pending.empty and self.pending_at(model).get(pod) is pending:
            self._drop(model, pod)

    def _drop(self, model: str, pod: str) -> None:
        pods = self._pending[model]
        del pods[pod]
        if not pods:
            del self._pending[model]

    def _delete_expired(self, budget: int, now: float) -> None:
        """Delete up to `budget` expired blocks. This frees memory; lookups ignore expired blocks anyway."""
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

    __slots__ = (
        "_blocks",
        "_ledger",
        "_load",
        "_pending",
        "_queued_tokens",
        "_released",
        "awaits_first_byte",
        "sent_at",
        "streams",
        "work_until_first_byte",
    )

    def __init__(
        self,
        ledger: LoadLedger,
        load: PodLoad,
        pending: Pending | None,
        blocks: list[int],
        queued_tokens: int,
        *,
        streams: bool,
        sent_at: float,
    ) -> None:
        self._ledger = ledger
        self._load = load
        self._pending = pending
        self._blocks = blocks
        self._queued_tokens = queued_tokens
        self._released = False
        self.streams = streams
        self.sent_at = sent_at
        self.work_until_first_byte = 0.0
        """What the pod had to compute when it was sent, its own tokens and those ahead of it; 0 if the time that it takes
        shows nothing."""
        self.awaits_first_byte = True
        """True until the answer begins."""

    def first_byte(self) -> None:
        """Record that the answer has begun, so the prompt has been computed."""
        now = self._ledger.now()
        if self.awaits_first_byte and self.work_until_first_byte:
            seconds = now - self.sent_at
            self._load.speed.observe(self.work_until_first_byte, seconds, now, is_whole=not self.streams)
        self._computed(now)

    def assume_computed(self, now: float) -> None:
        """The prompt must have been computed by now, but the answer begins only when all of it is generated."""
        self._load.computed(self, self._queued_tokens, now)
        self._queued_tokens = 0

    def untimed(self) -> None:
        """The request was sent earlier than it was charged: the time until its first byte shows nothing."""
        self.work_until_first_byte = 0.0

    def release(self) -> None:
        """End the charge: the request is over, and the pod has computed its prompt."""
        self._end(computed=True)

    def cancel(self) -> None:
        """End the charge of a request whose prompt the pod did not compute: its blocks stop being pending at once."""
        self._end(computed=False)

    def _computed(self, now: float) -> None:
        self.assume_computed(now)
        self.awaits_first_byte = False

    def _end(self, *, computed: bool) -> None:
        if self._released:
            return
        self._released = True
        now = self._ledger.now()
        self._computed(now)
        self._load.ended(now)
        self._ledger._release(self._pending, self._blocks, computed=computed)  # noqa: SLF001
