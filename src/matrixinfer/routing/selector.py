"""`matrixinfer.Selector`: decides which pod takes a prompt, for programs that send requests themselves.

    token ids + candidates ──> select ──> Decision ──> charge ──> InFlight

It is the gateway's own decision, without HTTP: the same scheduler, plugins and accounts of what is in flight.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import msgspec
import yaml

from matrixinfer.config import SchedulerConfig, parse
from matrixinfer.errors import ConfigError, InvalidRequest
from matrixinfer.routing import arguments
from matrixinfer.routing.embedded_index import Index
from matrixinfer.routing.embedded_lookup import Tokens
from matrixinfer.routing.holdings import Matches, charge, holdings, match_at
from matrixinfer.routing.observed import Observed
from matrixinfer.scheduler.framework import UNKNOWN, Candidate, Decision, SchedulingRequest, Services
from matrixinfer.scheduler.plugin_loader import discover
from matrixinfer.scheduler.plugins.kvcache_aware import KvCacheAware
from matrixinfer.scheduler.policies import POLICIES, with_policy
from matrixinfer.scheduler.scheduler import Scheduler
from matrixinfer.traffic.byte_chunks import cut
from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.traffic.load import Charge, LoadLedger
from matrixinfer.traffic.peers.loads import PeerLoads
from matrixinfer.traffic.prompt_sizes import Rates


class Selector:
    """Chooses pods by what `index` says, and by what this selector has sent to them.

    `policy` names a ready-made profile (`kv_aware` is the default). `config` is what the section `scheduler` of the
    gateway's configuration may say, with the same keys; installed plugins are known by their names. `clock` gives
    seconds and never goes back. Raises `ConfigError`.

    Not thread-safe: see `Index`.
    """

    def __init__(
        self,
        index: Index,
        *,
        policy: str | None = None,
        config: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        plugins, scheduler = discover(), _configured(index, policy, {} if config is None else config)
        generator = random.Random(scheduler.seed)  # noqa: S311 - breaks ties, protects nothing
        self._index = index
        self._known = index.known
        self._weights = scheduler.weights
        self._max_blocks = max(1, scheduler.max_prefix_tokens // self._known.blocks.block_size)
        self._scheduler = Scheduler(scheduler, Services(clock=clock, rng=generator), plugins, broken=plugins.broken)
        self._load = LoadLedger(clock, scheduler.pending_seconds)
        self._known.history.watch_gone(self._load)
        self._observed = Observed(self._load, PeerLoads())
        self._accounts = _Accounts(self._load, self._known.history)
        self._clock = clock

    @property
    def rejected(self) -> Mapping[str, int]:
        """How often each enabled plugin raised, or answered what the contract forbids."""
        return MappingProxyType(self._scheduler.rejected)

    def select(
        self,
        token_ids: Tokens | None,
        candidates: Iterable[Candidate | str],
        *,
        model: str,
        salt: str | None = None,
        session: str | None = None,
        prefix: bytes = b"",
        request_id: str = "",
        dry_run: bool = False,
    ) -> Decision:
        """Rank `candidates` for a prompt. Nothing is counted until `charge`; a dry run leaves plugins as they were, too.

        `token_ids` are those that the engine computes, chat template applied; None routes by load, and by where the
        beginning of `prefix` (the prompt's bytes, as the client sent them) was sent lately. A candidate is a name,
        or a `Candidate` with what the caller knows: its engine metrics with their age, and in `in_flight` and
        `queued_tokens` the load that this selector has not charged. The selector fills in what it and the index know, which is nothing for a
        name that the index does not follow. `model` is the name under which `Index.follow` has it, or an
        adapter's. `salt` is the request's cache salt; `session` is for plugins.

        Raises `NoPodAvailable` without candidates, and `InvalidRequest` for an argument that is wrong.
        """
        given = arguments.candidates(candidates)
        arguments.text(model, "model")
        if not isinstance(prefix, bytes):
            raise InvalidRequest(f"prefix: expected bytes, got {type(prefix).__name__}", param="prefix")
        chain = None if token_ids is None else self._known.chain(token_ids, salt=salt, max_blocks=self._max_blocks)
        known = None if token_ids is None else len(token_ids)
        chunks, unknown, ends = self._bytes(prefix, salt, known)
        request = SchedulingRequest(
            id=request_id,
            model=model,
            prompt_tokens=None if token_ids is None else len(token_ids),
            block_size=self._known.blocks.block_size,
            chain=() if chain is None else chain,
            prefix=prefix,
            session=session,
            now=self._clock(),
            unknown_tokens=unknown,
            chunks=chunks,
            chunk_ends=ends,
        )
        matches = None if chain is None else self._known.match(model, chain)
        pods = [self._candidate(each, request, matches) for each in given]
        return self._scheduler.schedule(request, pods, dry_run=dry_run)

    def charge(self, decision: Decision, candidate: Candidate | None = None) -> InFlight:
        """The request goes to `candidate`, by default the chosen one: count it there until it ends.

        Charge a decision before the next `select`, so that the next one sees it. Use the result in a `with` block.
        """
        request, pod = decision.request, candidate or decision.chosen
        return InFlight(self._accounts, request, pod, self._accounts.open(request, pod))

    def forget(self, pod: str) -> None:
        """Forget a pod that has gone, here and in the index."""
        self._accounts.forget(pod)
        self._observed.forget(pod)
        self._index.forget(pod)

    def _bytes(self, prefix: bytes, salt: str | None, known: int | None) -> tuple[Sequence[int], int, Sequence[int]]:
        """`chunks`, `unknown_tokens` and `chunk_ends` of a request."""
        if not prefix or not (known is None or self._scheduler.reads_bytes):
            return (), 0, ()
        found, rates = cut(prefix, salt=salt), Rates()
        if known is not None:
            return found.hashes, 0, rates.ends(found, known, found.text_bytes)
        return found.hashes, rates.tokens(found.text_bytes, found.media), rates.ends(found, 0, 0)

    def _candidate(self, base: Candidate, request: SchedulingRequest, matches: Matches | None) -> Candidate:
        name, load = base.name, self._load
        match = match_at(name, self._known.caches.of(name), matches)
        trust, pending, recent, credit, chunks, guessed = holdings(
            name, request, match, load, self._known.history, self._weights
        )
        cache, now = match.cache, request.now
        in_flight, queued_tokens, seconds, rate = load.view(name, now)
        condition = base.condition
        if condition == UNKNOWN:
            footprint = None if cache is None else cache.footprint
            condition = self._observed.condition(name, now, rate=rate, footprint=footprint, reported=None)
        else:
            rate = condition.prefill_rate or rate
        return msgspec.structs.replace(
            base,
            in_flight=base.in_flight + in_flight,
            queued_tokens=base.queued_tokens + queued_tokens,
            foreign=self._foreign(base, now),
            queue_seconds=seconds + (base.queued_tokens / rate if base.queue_seconds is None else base.queue_seconds),
            condition=condition,
            feed=None if cache is None else cache.feed,
            trust=trust,
            engine_block=base.engine_block if cache is None or cache.engine_block is None else cache.engine_block,
            matched_blocks=match.blocks,
            matched_tail=match.tail,
            dropped_tokens=0 if match.cache is None else match.cache.drop,
            tiers=match.tiers,
            pending_blocks=pending,
            recent_blocks=recent,
            cached_credit=credit,
            recent_chunks=chunks,
            guessed_tokens=guessed,
        )

    def _foreign(self, base: Candidate, now: float) -> int | None:
        """Requests there that neither the caller nor this selector knows."""
        if base.foreign is not None or base.running is None or base.metrics_age is None:
            return base.foreign
        counted = base.running + (base.waiting or 0)
        return max(0, self._observed.foreign(base.name, counted, now - base.metrics_age, now) - base.in_flight)


class InFlight:
    """A request that was sent to a pod. `Selector.charge` makes these.

    As a context manager it is finished when the block ends, and cancelled when the block raises.
    """

    __slots__ = ("_accounts", "_charge", "_computed", "_request", "candidate")

    def __init__(self, accounts: _Accounts, request: SchedulingRequest, candidate: Candidate, counted: Charge) -> None:
        self.candidate = candidate
        """Where the request is."""
        self._accounts = accounts
        self._request = request
        self._charge = counted
        self._computed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.cancel()

    def first_byte(self) -> None:
        """The answer began: the prompt is computed, and its tokens are no longer queued."""
        self._computed = True
        self._charge.first_byte()

    def move(self, candidate: Candidate) -> None:
        """Send the request to `candidate`, one of `Decision.attempts`, because its pod did not take it."""
        self._accounts.close(self._request, self.candidate, self._charge, computed=False)
        self.candidate = candidate
        self._computed = False
        self._charge = self._accounts.open(self._request, candidate)

    def finish(self) -> None:
        """The request was answered, so that the pod has computed its prompt. May be repeated."""
        self._accounts.close(self._request, self.candidate, self._charge, computed=True)

    def cancel(self) -> None:
        """The request failed: it leaves nothing at the pod, unless the answer had begun. May be repeated."""
        self._accounts.close(self._request, self.candidate, self._charge, computed=self._computed)


class _Accounts:
    """What one selector has in flight at each pod, until it ends or the pod is gone."""

    def __init__(self, load: LoadLedger, history: RoutingHistory) -> None:
        self._load = load
        self._history = history
        self._open: dict[str, set[Charge]] = {}

    def open(self, request: SchedulingRequest, candidate: Candidate) -> Charge:
        counted = charge(self._load, request, candidate)
        self._open.setdefault(candidate.name, set()).add(counted)
        return counted

    def close(self, request: SchedulingRequest, candidate: Candidate, counted: Charge, *, computed: bool) -> None:
        if not computed:
            counted.cancel()
        else:
            counted.release()
        here = self._open.get(candidate.name, set())
        if counted not in here:
            return  # closed before, or the pod is gone
        here.discard(counted)
        if not here:
            del self._open[candidate.name]
        if computed:
            exact = candidate.trust == "exact"
            self._history.computed(candidate.name, request.model, request.chain, is_exact=exact, chunks=request.chunks)

    def forget(self, pod: str) -> None:
        self._open.pop(pod, None)
        self._load.forget(pod)


def _configured(index: Index, policy: str | None, given: Mapping[str, Any]) -> SchedulerConfig:
    """The configuration of a selector's scheduler, read as the gateway reads its file. Raises `ConfigError`."""
    if not isinstance(given, Mapping):
        raise ConfigError("$.scheduler", f"expected a mapping, got {type(given).__name__}")
    try:
        text = yaml.safe_dump({"scheduler": dict(given)})
    except yaml.YAMLError as error:
        raise ConfigError("$.scheduler", f"expected plain data, as in YAML: {error}") from error
    scheduler = parse(text, base=Path()).scheduler
    blocks = index.known.blocks
    for i, entry in enumerate(given.get("pluginConfig", ())):
        args = entry.get("args", {}) if entry["name"] == KvCacheAware.name else {}
        for key, value in (("blockSizeToHash", blocks.block_size), ("hashScheme", blocks.scheme)):
            if args.get(key) not in (None, value):
                path = f"$.scheduler.pluginConfig[{i}].args.{key}"
                raise ConfigError(path, f"expected {value!r}, as the index has it, got {args[key]!r}")
    if policy is None:
        return scheduler
    if policy not in tuple(POLICIES):
        raise ConfigError("policy", f"unknown policy `{policy}`; there are: {', '.join(sorted(POLICIES))}")
    return with_policy(scheduler, policy)
