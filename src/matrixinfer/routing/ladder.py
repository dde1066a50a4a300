"""Puts a request that has ended on the ladder: what the pods were predicted to hold, and what its engine reused."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from matrixinfer.routing.in_flight import InFlight
from matrixinfer.routing.prepared import Prepared
from matrixinfer.scheduler.framework import Candidate, Decision
from matrixinfer.scheduler.plugins.bounded_load import BoundedLoad
from matrixinfer.scheduler.plugins.expected_ttft import ExpectedTtft
from matrixinfer.scheduler.plugins.least_request import LeastRequest
from matrixinfer.traffic.ladder.record import Ended, LadderLog

_REFRESH_SECONDS = 1.0
"""The caches' sizes are added up so often at most."""
_BY_LOAD = (BoundedLoad.name, ExpectedTtft.name, LeastRequest.name)
"""Filters that remove endpoints for their load."""


class LadderRecorder:
    """Records each request once, after its answer, so that no request waits for it. `clock` is that of decisions.

    `has_rule` says whether an endpoint's engine does not reuse every prefix that it holds.
    """

    def __init__(
        self, log: LadderLog, clock: Callable[[], float], *, has_rule: Callable[[str], bool] = lambda _: False
    ) -> None:
        self.log = log
        self._clock = clock
        self._has_rule = has_rule
        self._room: dict[str, tuple[float, int | None, int]] = {}  # base model -> until, tokens, caches

    def ended(self, request: InFlight) -> None:
        """Count a request. Only those count whose prompt an engine has computed."""
        if not request.computed:
            return
        prepared, decision = request.prepared, request.decision
        asked, chosen = decision.request, decision.chosen
        known = asked.prompt_tokens or 0
        late = 0 if known else request.request.prompt_tokens or 0
        bypasses = not prepared.prompt.reads_cache
        predicted = chosen.predicted_hit(known, asked.block_size)
        best, where = (0, chosen) if bypasses else _best(decision, predicted)
        held = best if where.reuse == 1.0 else max(best, where.cached_hit(known, asked.block_size))
        size = chosen.engine_block or asked.block_size
        capacity, pods = self._capacity(prepared.base_model, decision.candidates)
        self.log.ended(
            Ended(
                model=asked.model,
                base_model=prepared.base_model,
                prompt_tokens=known,
                unknown_tokens=(late or asked.unknown_tokens) + asked.other_tokens,
                hashes=request.request.chain[:],
                block_size=asked.block_size,
                usable=max(held, (known - 1) // size * size - chosen.dropped_tokens) if known else 0,
                held=held,
                best=best,
                predicted=predicted,
                why_other=_why_other(decision, where) if best > predicted else "scored",
                reported=request.cached if len(request.tried) == 1 else None,
                bypasses=bypasses,
                decided_at=asked.now,
                endpoint=request.pod.name,
                capacity=capacity,
                pods=pods,
                why_gone=self._why_gone(prepared, decision),
            )
        )

    def _why_gone(self, prepared: Prepared, decision: Decision) -> Callable[[str], str]:
        """Says why blocks are at no endpoint that one has computed and that the caches could have kept: a cause."""

        def why(endpoint: str) -> str:
            if prepared.matches is None or prepared.is_approximate:
                return "index"
            trust = next((each.trust for each in decision.candidates if each.name == endpoint), None)
            if trust is None:
                return "emptied"
            if trust != "exact":
                return "feed"
            return "kind" if self._has_rule(endpoint) else "dropped"

        return why

    def keep_models(self, models: Container[str]) -> None:
        """Forget models that are not among `models`."""
        self.log.keep_models(models)
        self._room.clear()

    def _capacity(self, model: str, candidates: Sequence[Candidate]) -> tuple[int | None, int]:
        """What the caches of the endpoints hold together, None if any is unknown, and how many they are."""
        now = self._clock()
        room = self._room.get(model)
        if room is None or now >= room[0]:
            sizes = [each.condition.cache_tokens for each in candidates]
            tokens = None if None in sizes else sum(filter(None, sizes))
            room = self._room[model] = now + _REFRESH_SECONDS, tokens, len(sizes)
        return room[1], room[2]


def _best(decision: Decision, predicted: int) -> tuple[int, Candidate]:
    """The largest hit that was predicted at any endpoint, and where."""
    request, best, where = decision.request, predicted, decision.chosen
    tokens, size = request.prompt_tokens, request.block_size
    for each in decision.candidates:
        if each.matched_blocks or each.pending_blocks or each.recent_blocks:
            hit = each.predicted_hit(tokens, size)
            if hit > best:
                best, where = hit, each
    return best, where


def _why_other(decision: Decision, best: Candidate) -> str:
    """Why the request did not go to the endpoint that held most of its prompt: the name of a cause."""
    chosen = decision.chosen
    if best.name in decision.filtered:
        if best.withheld is not None:
            return "withheld"
        plugin = decision.filtered[best.name].partition(":")[0]
        return f"{'overloaded' if plugin in _BY_LOAD else 'filtered'}:{plugin}"
    is_busier = best.load > chosen.load or best.queued_tokens > chosen.queued_tokens
    return "busier" if is_busier else "scored"
