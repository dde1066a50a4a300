"""One engine as a pure model: continuous batching over a prefix cache.

It has no clock, I/O or randomness. The caller submits requests, runs a step, lets its duration pass (in real or virtual
time), and then delivers its outputs and events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Generic, NamedTuple

import msgspec

from matrixinfer.blocks import TokenIds
from matrixinfer.sim.media import MediumRun
from matrixinfer.sim.prefix_cache import Adapter, Event, H, PrefixCache, S
from matrixinfer.sim.stats import EngineStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long a step takes, in seconds: a sum of terms, each linear in what the step computes."""

    step: float = 0.004
    """For every step."""
    prefill_token: float = 0.0001
    """For each prompt token that is computed; cached ones cost nothing."""
    decode_sequence: float = 0.0002
    """For each sequence that gets one more token."""
    attention_pair: float = 0.0
    """For each pair of a computed token and a token before it."""
    decode_context: float = 0.0
    """For each token before the one that a decoding sequence gets: its keys and values are read."""
    load_block: float = 0.00005
    """For each block that is loaded from the CPU tier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """A prompt, and the reply that the engine will give."""

    id: int
    prompt: TokenIds
    reply: Items[int]
    """Token ids; at least one."""
    salt: str | None = None
    """Only requests with the same salt share blocks."""
    adapter: Adapter | None = None
    """Only requests with the same adapter share blocks."""
    extra_key: str | None = None
    """Only requests with the same key share blocks. SGLang's; no event shows it."""
    media: Items[MediumRun] = ()
    """The images, audio and video in the prompt."""
    reports_hits: bool = False
    """Events report the blocks that it finds in the cache as if they were stored again."""


class Output(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One more token of a request's reply."""

    request_id: int
    generated: int
    """Tokens of the reply so far."""
    cached_tokens: int
    """Prompt tokens that were cached, on any tier, when the request was first scheduled."""
    finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """The result of one step. Deliver outputs and events when its duration, in seconds, has passed."""

    duration: float
    outputs: list[Output]
    events: list[Event]


class _Work(NamedTuple, Generic[S]):
    """A request's part of a step."""

    run: _Run[S]
    tokens: int
    """Tokens to compute."""
    loaded: int = 0
    """Blocks to load from the CPU tier."""


class _Run(Generic[S]):
    """A request's progress."""

    __slots__ = ("cached", "computed", "generated", "request", "sequence")

    def __init__(self, request: EngineRequest, sequence: S) -> None:
        self.request = request
        self.sequence = sequence
        self.computed = 0
        self.generated = 0
        self.cached: int | None = None

    @property
    def finished(self) -> bool:
        return self.generated == len(self.request.reply)


class EngineModel(Generic[S, H]):
    """Schedules as vLLM does: first come, first served, at most `max_tokens` per step, long prompts in chunks.

    Running requests go first. If one finds no free block, the latest arrival is preempted: it later starts again, from
    the blocks that are still cached.
    """

    def __init__(
        self, cache: PrefixCache[S, H], timing: Timing, *, max_tokens: int = 2048, max_sequences: int = 256
    ) -> None:
        self._cache = cache
        self._timing = timing
        self._max_tokens = max_tokens
        self._max_sequences = max_sequences
        self._running: list[_Run[S]] = []
        self._waiting: deque[_Run[S]] = deque()
        self._full = False
        self._prefix_queries = self._prefix_hits = self._loaded_tokens = 0
        self._prompt_tokens = self._generated_tokens = self._preemptions = self._computed_prompt_tokens = 0
        self._prefill_seconds = 0.0

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._running or self._waiting)

    @property
    def stats(self) -> EngineStats:
        """Current gauges and totals."""
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            cache_usage=self._cache.usage,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            loaded_tokens=self._loaded_tokens,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self._preemptions,
            used_tokens=round(self._cache.usage * self._cache.capacity),
            waiting_tokens=sum(len(run.sequence.tokens) for run in self._waiting),
            computed_prompt_tokens=self._computed_prompt_tokens,
            prefill_seconds=self._prefill_seconds,
        )

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. Raises `ValueError` when it is empty, or longer than the cache."""
        total = len(request.prompt) + len(request.reply)
        if not len(request.prompt) or not len(request.reply):
            raise ValueError("expected at least one prompt token and one reply token")
        if total > self._cache.capacity:
            raise ValueError(f"expected at most {self._cache.capacity} tokens, which the cache holds, got {total}")
        sequence = self._cache.sequence(request.prompt, request.salt, request.adapter, request.extra_key, request.media)
        self._waiting.append(_Run(request, sequence))

    def abort(self, request_id: int) -> None:
        """Drop a request if it is unfinished. The blocks that it filled stay cached."""
        for run in self._running:
            if run.request.id == request_id:
                self._running.remove(run)
                self._release(run)
                return
        for run in self._waiting:
            if run.request.id == request_id:
                self._waiting.remove(run)
                return

    def reset_prefix_cache(self) -> bool:
        """Clear the cache; False while any block is in use. The event comes with the next step, as with vLLM."""
        return self._cache.reset()

    def take_events(self) -> list[Event]:
        """The events since the last step, for engines that publish them while they are idle."""
        return self._cache.take_events()

    def step(self) -> StepResult:
        """Compute one batch."""
        batch: list[_Work[S]] = []
        if self._cache.new_step():
            self._full = False
        budget = self._schedule_running(batch)
        self._schedule_waiting(batch, budget)
        duration = self._duration(batch)
        if any(not work.run.generated for work in batch):
            self._prefill_seconds += duration
        outputs = [output for work in batch if (output := self._advance(work.run, work.tokens)) is not None]
        if any(output.finished for output in outputs):
            self._running = [run for run in self._running if not run.finished]
        return StepResult(duration=duration, outputs=outputs, events=self._cache.take_events())

    def _schedule_running(self, batch: list[_Work[S]]) -> int:
        """Return the rest of the step's token budget, or 0 when a request was preempted."""
        budget = self._max_tokens
        preempted = False
        position = 0
        while position < len(self._running) and budget:
            run = self._running[position]
            count = self._chunk(run, budget)
            if not count:
                position += 1
            elif self._cache.allocate(run.sequence, run.computed + count):
                batch.append(_Work(run, count))
                budget -= count
                position += 1
            else:
                self._preempt(self._running.pop())
                preempted = True
        return 0 if preempted else budget

    def _schedule_waiting(self, batch: list[_Work[S]], budget: int) -> None:
        while budget and self._waiting and not self._full and len(self._running) < self._max_sequences:
            run = self._waiting[0]
            hit = self._cache.lookup(run.sequence)
            if not self._cache.fits(run.sequence, hit):
                # Only a release frees blocks: do not look again before one does.
                self._full = True
                return
            if run.request.reports_hits:
                self._cache.report(run.sequence, hit)
            loaded = self._cache.load(run.sequence, hit)
            run.computed = hit.tokens + loaded
            count = self._chunk(run, budget)
            if not count or not self._cache.allocate(run.sequence, run.computed + count, hit):
                return
            if run.cached is None:
                run.cached = run.computed
                self._prefix_queries += len(run.sequence.tokens)
                self._prefix_hits += hit.tokens
                self._loaded_tokens += loaded
            self._running.append(self._waiting.popleft())
            batch.append(_Work(run, count, loaded // self._cache.block_size))
            budget -= count

    def _chunk(self, run: _Run[S], budget: int) -> int:
        """How many tokens of a request the step computes."""
        count = min(len(run.sequence.tokens) - run.computed, budget)
        return self._cache.chunk(run.sequence, run.computed, count, self._max_tokens)

    def _advance(self, run: _Run[S], count: int) -> Output | None:
        run.computed += count
        self._cache.computed(run.sequence, run.computed)
        if not run.generated:
            self._computed_prompt_tokens += count
        if run.computed < len(run.sequence.tokens):
            return None
        if not run.generated:
            self._prompt_tokens += len(run.request.prompt)
        run.sequence.append(run.request.reply[run.generated])
        run.generated += 1
        self._generated_tokens += 1
        if run.finished:
            self._release(run)
        return Output(
            request_id=run.request.id,
            generated=run.generated,
            cached_tokens=run.cached or 0,
            finished=run.finished,
        )

    def _preempt(self, run: _Run[S]) -> None:
        self._release(run, preempted=True)
        run.computed = 0
        self._preemptions += 1
        self._waiting.appendleft(run)

    def _release(self, run: _Run[S], *, preempted: bool = False) -> None:
        self._cache.release(run.sequence, preempted=preempted)
        self._full = False

    def _duration(self, batch: list[_Work[S]]) -> float:
        prefill = decode = loads = contexts = 0
        pairs = 0.0
        for run, count, loaded in batch:
            loads += loaded
            if run.generated and count == 1:
                decode += 1
                contexts += run.computed
            else:
                prefill += count
            pairs += count * (run.computed + count / 2)
        timing = self._timing
        return (
            timing.step
            + prefill * timing.prefill_token
            + decode * timing.decode_sequence
            + pairs * timing.attention_pair
            + contexts * timing.decode_context
            + loads * timing.load_block
        )
