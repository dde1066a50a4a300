"""Keeps the ladder of the requests that have ended: a tracker of reuse per model, and a ring of tallies. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from hashlib import sha256

import msgspec

from matrixinfer.traffic.ladder.reuse import MOST_TOUCHED, ReuseTracker, Visit
from matrixinfer.traffic.ladder.rungs import Ladder, flat, of
from matrixinfer.traffic.ladder.tally import LOST, Tally, total

PERIOD_SECONDS = 60.0
KEPT_SECONDS = 86_400.0
"""A tally covers the first of these; tallies are kept for the second, and so are blocks that nobody uses."""
_MOST_MODELS = 16
_MOST_ADAPTERS = 1_024
_MOST_LEFT = 64
_MASK = (1 << 63) - 1
_ENDS = f"{LOST}ends"


class Ended(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A request whose prompt was computed, as far as the ladder needs it. All hits are in prompt tokens."""

    model: str
    base_model: str
    """The model whose caches it uses; another one if `model` is an adapter."""
    prompt_tokens: int
    """Whose ids were known at the decision."""
    unknown_tokens: int = 0
    """About so many more were in the request."""
    hashes: Sequence[int]
    """Of the full blocks of the prompt, and of its reply where that is known."""
    block_size: int
    usable: int
    """The most that an engine can reuse of it."""
    held: int
    """What the pod holds that was predicted to reuse most."""
    best: int
    """What it was predicted to reuse: less, if its engine reuses less than it holds."""
    predicted: int
    """What the chosen pod was predicted to hold."""
    why_other: str = "scored"
    """The cause, if that is less."""
    reported: int | None = None
    """What the chosen pod's engine reused; None if it did not say, or if another pod computed the prompt."""
    bypasses: bool = False
    """It asked not to read the cache."""
    decided_at: float
    endpoint: str
    """Which has computed it."""
    capacity: int | None
    """Tokens that the caches of all pods hold together that it could go to; None if unknown."""
    pods: int
    why_gone: Callable[[str], str]
    """Why blocks are at no pod that an endpoint has computed and that the caches could have kept: a cause."""


class LadderLog:
    """The tallies of the last day by minute, and which blocks were used when, both within fixed bounds.

    `clock` is in seconds and never goes back. `most_blocks` are remembered for each model, and `most_touched` looked at in ten seconds, none without `tracks`: where a
    block's hash does not depend on those before it, it does not say whether its prefix was seen before.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        most_blocks: int = 16_384,
        kept_seconds: float = KEPT_SECONDS,
        tracks: bool = True,
        most_touched: float = MOST_TOUCHED,
    ) -> None:
        self._tracks = tracks
        self._clock = clock
        self._kept_seconds = kept_seconds
        self._most_blocks = most_blocks
        self._most_touched = most_touched
        self._trackers: dict[str, ReuseTracker] = {}  # by base model
        self._bases: dict[str, tuple[str, int]] = {}  # model -> base model and mask
        self._emptied: dict[str, float] = {}  # endpoint -> when it lost its blocks
        self._left: dict[str, float] = {}  # endpoint -> when it went, the latest last
        self._tallies: deque[tuple[float, Tally]] = deque()  # by the start of the period
        self._is_open = False  # whether the last period is still to be counted
        self._counted: dict[str, float] = {}

    def __len__(self) -> int:
        """Number of blocks remembered."""
        return sum(map(len, self._trackers.values()))

    # What happens

    def ended(self, request: Ended) -> None:
        """Count a request that has ended."""
        now = self._clock()
        tally = self._tally(now)
        tally.add("requests", 1)
        known, unknown = request.prompt_tokens, request.unknown_tokens
        tally.add("prompt", known + unknown)
        if unknown:
            tally.add(f"{LOST}ids_unknown", unknown)
        tally.capacity, tally.pods = request.capacity, request.pods
        if request.bypasses:
            tally.add(f"{LOST}caches_bypassed", known)
            return
        if known:
            if request.best > request.predicted:
                tally.add(f"{LOST}{request.why_other}", request.best - request.predicted)
            self._compare(tally, request)
        self._look(tally, request, now)

    def serves(self, model: str, base_model: str) -> tuple[ReuseTracker | None, int]:
        """From now on, what engines store of a model counts. `base_model` is the one whose caches it uses.

        Returns its tracker, None if there is none or too many models, and what tells its blocks from those of others there.
        """
        known = self._bases.get(model)
        if known is None:
            if len(self._bases) >= _MOST_ADAPTERS:
                self._bases.clear()
            is_base = model == base_model
            mask = 0 if is_base else int.from_bytes(sha256(model.encode()).digest()[:8], "big") & _MASK
            known = self._bases[model] = base_model, mask
        base, mask = known
        tracker = self._trackers.get(base)
        if tracker is None and self._tracks and len(self._trackers) < _MOST_MODELS:
            tracker = self._trackers[base] = ReuseTracker(
                self._most_blocks, horizon=self._kept_seconds, most_touched=self._most_touched
            )
        return tracker, mask

    def stored(self, model: str, endpoint: str, hashes: Sequence[int]) -> None:
        """An endpoint's events say that it has stored blocks of a model that was asked for."""
        base = self._bases.get(model)
        tracker = None if base is None else self._trackers.get(base[0])
        if base is not None and tracker is not None:
            tracker.introduce(hashes, mask=base[1], now=self._clock(), endpoint=endpoint)

    def emptied(self, endpoint: str) -> None:
        """An endpoint has lost all blocks, or what is known about them."""
        self._emptied[endpoint] = self._clock()

    def forget(self, endpoint: str) -> None:
        """An endpoint has gone. One of its name may come back, without its blocks."""
        self._emptied.pop(endpoint, None)
        self._left.pop(endpoint, None)
        if len(self._left) >= _MOST_LEFT:
            del self._left[next(iter(self._left))]
        self._left[endpoint] = self._clock()

    def keep_models(self, models: Container[str]) -> None:
        """Forget models that are not among `models`."""
        self._bases = {model: base for model, base in self._bases.items() if model in models}
        bases = {base for base, _ in self._bases.values()}
        self._trackers = {base: each for base, each in self._trackers.items() if base in bases}

    # What is shown

    def since(self, seconds: float) -> Ladder:
        """The ladder of the requests that have ended in the last `seconds`, give or take a period."""
        oldest = self._clock() - seconds - PERIOD_SECONDS
        return of(total(tally for start, tally in self._tallies if start > oldest))

    def counters(self) -> Mapping[str, float]:
        """As `rungs.flat`, of all requests whose period is over."""
        self._roll(self._clock())
        return self._counted

    # Within

    def _look(self, tally: Tally, request: Ended, now: float) -> None:
        size, known = request.block_size, request.prompt_tokens
        stop = min(request.usable // size, len(request.hashes))
        start = min(stop, -(-request.held // size))
        beyond = (stop - start) * size
        cut = max(0, request.usable // size * size - max(stop * size, request.held))
        if cut:
            tally.add(f"{LOST}not_looked_up", cut)
        if request.held != request.best:
            tally.add(f"{LOST}reuses_less", request.held - request.best)
        tally.add(_ENDS, known - request.held - beyond - cut)
        tracker, mask = self.serves(request.model, request.base_model)
        if tracker is None:
            tally.add(f"{LOST}unsampled", beyond)
            return
        found = tracker.visit(
            request.hashes, start, stop, mask=mask, since=request.decided_at, now=now, endpoint=request.endpoint
        )
        if beyond or found.rate < tally.rate:
            tally.look(found, size, beyond=beyond, capacity=request.capacity, why=partial(self._why, request))

    def _why(self, request: Ended, last: Visit) -> str:
        """Why no pod has blocks that the caches could have kept since their last visit."""
        at = max(self._emptied.get(last.endpoint, last.at), self._left.get(last.endpoint, last.at))
        return "emptied" if at > last.at else request.why_gone(last.endpoint)

    def _compare(self, tally: Tally, request: Ended) -> None:
        if request.reported is None:
            return
        whole = request.prompt_tokens + request.unknown_tokens
        reported = min(request.reported, whole)  # the engine may count more tokens than we
        less = request.predicted - reported
        tally.add("reported_requests", 1)
        tally.add("reported_prompt", whole)
        tally.add("reported_predicted", request.predicted)
        tally.add("reported", reported)
        tally.add("reported_fewer" if less > 0 else "reported_more", abs(less))

    def _tally(self, now: float) -> Tally:
        """That of the current period."""
        self._roll(now)
        if not self._tallies or now - self._tallies[-1][0] >= PERIOD_SECONDS:
            self._tallies.append((now, Tally()))
            self._is_open = True
        return self._tallies[-1][1]

    def _roll(self, now: float) -> None:
        """Count the last period if it is over, and drop those that are too old."""
        tallies = self._tallies
        if self._is_open and now - tallies[-1][0] >= PERIOD_SECONDS:
            self._is_open = False
            for name, tokens in flat(tallies[-1][1]).items():
                self._counted[name] = self._counted.get(name, 0.0) + tokens
        while tallies and now - tallies[0][0] >= self._kept_seconds + PERIOD_SECONDS:
            tallies.popleft()
