"""`sim.model.EngineModel` for replays: the same schedule, hits and events, at a cost per event instead of per token.

Steps in which every request only decodes one more token, and no block fills or is taken, are computed together: their
duration is a sum in closed form. `tests/unit/study/test_engine.py` holds both models against each other.

The engine does not know tokens. A request has the hashes of all blocks that its prompt and its reply will fill.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, NamedTuple

from matrixinfer.sim.model import Timing
from matrixinfer.study.pool import Pool


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShape:
    """What an engine can do: tokens per block and per step, sequences at a time, and how long a step takes."""

    block_size: int
    timing: Timing
    max_tokens: int = 2048
    max_sequences: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.max_sequences < self.max_tokens or self.block_size < 1:
            raise ValueError("expected blocks of at least one token, and more tokens per step than sequences")


class Stored(NamedTuple):
    """Consecutive blocks of one prompt became reusable."""

    owner: Any
    """The request."""
    first: int
    last: int
    """Positions [first, last) in the request's hashes."""


class Run:
    """One request's progress in an engine."""

    __slots__ = (
        "blocks",
        "cached",
        "computed",
        "generated",
        "hashes",
        "joined",
        "number",
        "owner",
        "prompt",
        "reply",
        "stored",
        "versions",
    )

    def __init__(self, owner: Any, prompt: int, reply: int, hashes: Sequence[int]) -> None:
        self.owner = owner
        self.prompt = prompt
        self.reply = reply
        self.hashes = hashes
        self.blocks: list[int] = []
        self.cached: int | None = None
        """Prompt tokens that were cached when it was first scheduled."""
        self.computed = self.generated = self.stored = 0
        self.number = -1  # its place in the order of admission
        self.joined = 0  # the step up to which `computed` and `generated` are true, while it decodes
        self.versions = 0  # entries of earlier versions in the heap of special steps are void

    @property
    def length(self) -> int:
        """Tokens of prompt and reply so far."""
        return self.prompt + self.generated


class StepEnd(NamedTuple):
    """What comes out at the end of a step."""

    first: Sequence[Run]
    """Requests that got their first token."""
    finished: Sequence[Run]
    stored: Sequence[Stored | int]
    """Changes of the cache in order: stored blocks, and the hashes of evicted ones."""


_NOTHING = StepEnd((), (), ())


class Engine:
    """One replica. `start` begins the next step, or several alike; `finish` ends what was begun, at the time of `ends_at`.

    `slowness` stretches every step. Engines that share a `pool` share a cache, and see each other's blocks at once.
    """

    def __init__(self, shape: EngineShape, pool: Pool, *, slowness: float = 1.0) -> None:
        self.shape = shape
        self.pool = pool
        self.slowness = slowness
        self.ends_at = math.inf
        """When the current step ends; infinity while the engine is idle."""
        self.waiting: deque[Run] = deque()
        self.preemptions = self.computed_tokens = 0
        self.busy_seconds = 0.0
        self._decoding: dict[int, Run] = {}  # by number, in the order of admission
        self._prefilling: Run | None = None  # at most one prompt is computed in part: it takes the rest of each step
        self._contexts = 0  # sum of `computed` over decoding requests, at the current step
        self._step = 0
        self._number = 0
        self._special: list[tuple[int, int, int, Run]] = []  # step, number, version
        self._full = False
        self._end = _NOTHING
        self._plain: tuple[float, float, float, int] | None = None  # start, first duration, growth, steps

    @property
    def running(self) -> int:
        """Requests that hold blocks."""
        return len(self._decoding) + (self._prefilling is not None)

    @property
    def usage(self) -> float:
        """Share of blocks in use by running requests."""
        return 1 - self.pool.free / self.pool.capacity

    def work_with(self, prompt: int, hashes: Sequence[int]) -> int:
        """Prompt tokens to compute until a request that came now would have its first, if nothing is evicted before."""
        size, cached = self.shape.block_size, self.pool.cached
        run = self._prefilling
        left, coming = 0, set[int]()
        if run is not None:
            left = run.length - run.computed
            coming.update(run.hashes[: run.length // size])
        for length, keys in (*((each.length, each.hashes) for each in self.waiting), (prompt, hashes)):
            most = (length - 1) // size
            hit = next((at for at in range(most) if keys[at] not in cached and keys[at] not in coming), most)
            left += length - hit * size
            coming.update(keys[: length // size])
        return left

    @property
    def decode_seconds(self) -> float:
        """What the decoding requests add to the next step."""
        timing, count = self.shape.timing, len(self._decoding)
        return count * timing.decode_sequence + (timing.attention_pair + timing.decode_context) * self._contexts

    @property
    def capacity(self) -> int:
        """The longest prompt and reply together, in tokens."""
        return self.pool.capacity * self.shape.block_size

    def submit(self, run: Run, now: float) -> None:
        """Queue a request. A run of plain steps is cut short at the end of the step that is under way."""
        self.waiting.append(run)
        if self._plain is not None and not self._full and self.running < self.shape.max_sequences:
            start, first, growth, steps = self._plain
            done = _steps_until(now - start, first, growth, steps)
            if done < steps:
                self._plain = (start, first, growth, done)
                self.ends_at = start + _duration(done, first, growth)

    def reset(self) -> bool:
        """Clear the cache; False while any request runs."""
        return self.pool.clear()

    def abort_all(self) -> list[Run]:
        """The engine stops: everything that it had is lost. Returns its requests."""
        self._settle()
        lost = [*self._decoding.values(), *([self._prefilling] if self._prefilling else []), *self.waiting]
        for run in lost:
            self.pool.give_back(run.blocks)
            run.blocks = []
            run.versions += 1
        self._decoding.clear()
        self.waiting.clear()
        self._prefilling, self._plain, self._end, self._full = None, None, _NOTHING, False
        self._contexts, self.ends_at = 0, math.inf
        return lost

    def finish(self) -> StepEnd:
        """End the current step. Call `start` next."""
        self._settle()
        end, self._end, self.ends_at = self._end, _NOTHING, math.inf
        return end

    def start(self, now: float) -> None:
        """Begin the next step, if there is anything to compute."""
        if not (self._decoding or self._prefilling or self.waiting):
            return
        if not (self._decoding or self._prefilling):
            self._full = False  # a shared cache may have room again
        blocked = not self.waiting or self._full or self.running >= self.shape.max_sequences
        if self._prefilling is None and blocked and self._decoding:
            plain = self._next_special() - self._step
            if plain > 0:
                first, growth = self._plain_duration()
                self._plain = (now, first, growth, plain)
                self.ends_at = now + _duration(plain, first, growth)
                return
        self.ends_at = now + self._schedule()

    def _settle(self) -> None:
        """Count the plain steps that have been computed."""
        if self._plain is None:
            return
        _, first, growth, steps = self._plain
        self._plain = None
        self._step += steps
        self._contexts += steps * len(self._decoding)
        self.busy_seconds += _duration(steps, first, growth)

    def _plain_duration(self) -> tuple[float, float]:
        timing, count = self.shape.timing, len(self._decoding)
        per_context = timing.attention_pair + timing.decode_context
        first = timing.step + count * timing.decode_sequence
        first += timing.attention_pair * count / 2 + per_context * self._contexts
        return first * self.slowness, per_context * count * self.slowness

    def _schedule(self) -> float:
        """Compute one step, and return its duration."""
        batch = _Batch()
        budget = self._schedule_decoding(batch)
        contexts, decoding = self._contexts, len(self._decoding)
        if budget:
            budget = self._schedule_prefilling(batch, budget)
        if budget:
            self._schedule_waiting(batch, budget)
        self._contexts += decoding
        self._step += 1
        for run in batch.finished:
            del self._decoding[run.number]
            self._contexts -= run.computed + 1
            self._release(run)
        for run in batch.prefilled:
            if run.generated == run.reply:
                batch.finished.append(run)
                self._release(run)
            else:
                self._decode(run)
        timing = self.shape.timing
        seconds = self.slowness * (
            timing.step
            + batch.tokens * timing.prefill_token
            + (decoding + batch.decodes) * timing.decode_sequence
            + timing.attention_pair * (batch.pairs + contexts + decoding / 2)
            + timing.decode_context * (contexts + batch.contexts)
        )
        self.busy_seconds += seconds
        self._end = StepEnd([run for run in batch.prefilled if run.generated == 1], batch.finished, batch.cache)
        return seconds

    def _schedule_decoding(self, batch: _Batch) -> int:
        """Do what some of the decoding requests need in this step. Returns the rest of its tokens; 0 after a preemption."""
        size, step, preempted = self.shape.block_size, self._step, False
        while self._special and self._special[0][0] == step:
            _, _, version, run = heappop(self._special)
            if version != run.versions:
                continue
            self._advance(run)
            if run.computed == len(run.blocks) * size:
                while run.number >= 0 and not self.pool.free:
                    self._preempt_last()
                    preempted = True
                if run.number < 0:
                    continue
                self._take(run, 1, batch.cache)
            if not (run.computed + 1) % size:
                self._store(run, run.stored + 1, batch.cache)
            if run.generated + 1 == run.reply:
                run.generated += 1
                batch.finished.append(run)
            else:
                self._push(run, after=1)
        return 0 if preempted else self.shape.max_tokens - len(self._decoding)

    def _schedule_prefilling(self, batch: _Batch, budget: int) -> int:
        """Continue the prompt that is computed in part. Returns the rest of the step's tokens."""
        run = self._prefilling
        if run is None:
            return budget
        count = min(run.length - run.computed, budget)
        missing = -(-(run.computed + count) // self.shape.block_size) - len(run.blocks)
        if missing > self.pool.free:
            self._preempt_last()
            return 0
        self._prefilling = None
        self._take(run, missing, batch.cache)
        self._compute(run, count, batch)
        return budget - count

    def _schedule_waiting(self, batch: _Batch, budget: int) -> None:
        size, pool = self.shape.block_size, self.pool
        running = self.running + len(batch.prefilled)
        while budget and self.waiting and not self._full and running < self.shape.max_sequences:
            run = self.waiting[0]
            hit = pool.matched(run.hashes, (run.length - 1) // size)
            if -(-run.length // size) - len(hit) + pool.idle(hit) > pool.free:
                self._full = True  # only a release frees blocks
                return
            self.waiting.popleft()
            running += 1
            run.number = self._number = self._number + 1
            pool.share(hit)
            run.blocks, run.stored, run.computed = hit, len(hit), len(hit) * size
            if run.cached is None:
                run.cached = run.computed
            count = min(run.length - run.computed, budget)
            self._take(run, -(-(run.computed + count) // size) - len(hit), batch.cache)
            self._compute(run, count, batch)
            budget -= count

    def _compute(self, run: Run, count: int, batch: _Batch) -> None:
        """Compute `count` tokens of a prompt, or of a prompt and what was generated before a preemption."""
        batch.pairs += count * (run.computed + count / 2)
        if run.generated and count == 1:
            batch.decodes += 1
            batch.contexts += run.computed
        else:
            batch.tokens += count
        if not run.generated:
            self.computed_tokens += count
        run.computed += count
        full = run.computed // self.shape.block_size
        if full > run.stored:
            self._store(run, full, batch.cache)
        if run.computed == run.length:
            run.generated += 1
            batch.prefilled.append(run)
        else:
            self._prefilling = run

    def _decode(self, run: Run) -> None:
        """From the next step on, the request decodes."""
        run.joined = self._step
        self._decoding[run.number] = run
        self._contexts += run.computed
        self._push(run, after=0)

    def _advance(self, run: Run) -> None:
        """Count the steps that a decoding request has taken since it was last looked at."""
        steps = self._step - run.joined
        run.computed += steps
        run.generated += steps
        run.joined = self._step

    def _push(self, run: Run, *, after: int) -> None:
        """Note the next step in which a decoding request takes or fills a block, or ends. `after` steps are decided."""
        size = self.shape.block_size
        past = (run.computed + after) % size
        steps = min(-past % size, size - 1 - past, run.reply - run.generated - after - 1)
        heappush(self._special, (run.joined + after + steps, run.number, run.versions, run))

    def _next_special(self) -> int:
        special = self._special
        while special[0][2] != special[0][3].versions:
            heappop(special)
        return special[0][0]

    def _take(self, run: Run, count: int, cache: list[Stored | int]) -> None:
        pool = self.pool
        run.blocks += pool.take(count)
        if pool.removed:
            cache += pool.removed
            pool.removed.clear()

    def _store(self, run: Run, full: int, cache: list[Stored | int]) -> None:
        for at in range(run.stored, full):
            self.pool.store(run.hashes[at], run.blocks[at])
        cache.append(Stored(run.owner, run.stored, full))
        run.stored = full

    def _preempt_last(self) -> None:
        """The latest arrival gives up its blocks, and waits."""
        run = self._prefilling
        if run is None:
            _, run = self._decoding.popitem()
            self._advance(run)
            self._contexts -= run.computed
        self._prefilling = None
        self._release(run)
        run.computed = run.stored = 0
        self.preemptions += 1
        self.waiting.appendleft(run)

    def _release(self, run: Run) -> None:
        self.pool.give_back(run.blocks)
        run.blocks, run.number = [], -1
        run.versions += 1
        self._full = False


class _Batch:
    """What one step computes besides one token of each decoding request."""

    __slots__ = ("cache", "contexts", "decodes", "finished", "pairs", "prefilled", "tokens")

    def __init__(self) -> None:
        self.tokens = self.decodes = self.contexts = 0
        self.pairs = 0.0
        self.prefilled: list[Run] = []
        self.finished: list[Run] = []
        self.cache: list[Stored | int] = []


def _duration(steps: int, first: float, growth: float) -> float:
    """Seconds of `steps` steps, each `growth` longer than the one before."""
    return steps * first + growth * (steps * (steps - 1) // 2)


def _steps_until(elapsed: float, first: float, growth: float, most: int) -> int:
    """The first number of steps, at least 1, that takes `elapsed` seconds or more."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if _duration(middle, first, growth) >= elapsed:
            high = middle
        else:
            low = middle + 1
    return low
