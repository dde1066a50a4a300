"""The decision path: a request body in, a dispatched request out.

    body ─> Preparer ─> Candidates ─> Scheduler ─> InFlight

Everything that awaits happens in the preparer. From the snapshot of candidates to the charge for the chosen endpoint
nothing awaits, so the next request sees this one.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial

from matrixinfer.access.gate import Ticket
from matrixinfer.config import WeightsConfig
from matrixinfer.pods.outliers import Outliers
from matrixinfer.pods.registry import PodRegistry
from matrixinfer.prompt.requests import Reader
from matrixinfer.routing.audit import Auditor
from matrixinfer.routing.candidates import Candidates
from matrixinfer.routing.decision_log import DecisionLog, DecisionWatch, record
from matrixinfer.routing.demand import demand_of
from matrixinfer.routing.destinations import NO_HEADERS
from matrixinfer.routing.holdings import charge
from matrixinfer.routing.in_flight import InFlight
from matrixinfer.routing.ladder import LadderRecorder
from matrixinfer.routing.prepare import Preparer
from matrixinfer.routing.prepared import Prepared
from matrixinfer.scheduler.framework import Candidate, SchedulingRequest
from matrixinfer.scheduler.scheduler import Scheduler
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.telemetry.stages import Stages
from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.traffic.load import Charge, LoadLedger


class Router:
    """Decides where requests go, and charges them there for as long as they are in flight."""

    def __init__(
        self,
        *,
        registry: PodRegistry,
        preparer: Preparer,
        candidates: Candidates,
        scheduler: Scheduler,
        load: LoadLedger,
        history: RoutingHistory,
        outliers: Outliers,
        auditor: Auditor,
        decisions: DecisionLog,
        metrics: Metrics,
        ladder: LadderRecorder | None = None,
        clock: Callable[[], float] = time.monotonic,
        watch: DecisionWatch | None = None,
    ) -> None:
        self._watch = watch
        self._registry = registry
        self._preparer = preparer
        self._candidates = candidates
        self._scheduler = scheduler
        self._load = load
        self._history = history
        self._outliers = outliers
        self._auditor = auditor
        self._decisions = decisions
        self._metrics = metrics
        self._ladder = ladder
        self._clock = clock

    def reconfigure(self, scheduler: Scheduler, weights: WeightsConfig, slow_start_seconds: float) -> None:
        """Decide in this way from the next decision on."""
        self._scheduler = scheduler
        self._candidates.reconfigure(weights, slow_start_seconds)

    @property
    def slow_start_seconds(self) -> float:
        """How long pods that came up get no more than a share."""
        return self._candidates.slow_start_seconds

    @asynccontextmanager
    async def dispatch(
        self,
        path: str,
        body: bytes,
        *,
        request_id: str,
        session: str | None = None,
        ticket: Ticket | None = None,
        read: Reader | None = None,
        headers: Mapping[str, str] = NO_HEADERS,
        stages: Stages | None = None,
    ) -> AsyncIterator[InFlight]:
        """Choose an endpoint and charge it while the context is open. Raises `RequestError` or `RoutingError`.

        With a `ticket` the request is admitted first, which may take a while. The endpoint is chosen after that. `read`
        reads a body that brings no prompt; `headers` may decide the route. `stages` takes the steps on the way.
        """
        started = self._clock()
        prepared = await self._preparer.prepare(
            path,
            body,
            request_id=request_id,
            session=session,
            ticket=ticket,
            read=read,
            headers=headers,
            stages=stages,
        )
        if ticket is not None:
            waits_from = self._clock()
            prepared = await self._admitted(prepared, ticket, stages)
            started += self._clock() - waits_from
        began = self._clock()
        request = self._decide(prepared, path)
        try:
            decided = self._clock()
            if stages is not None:
                stages.add("schedule", began, decided)
            self._observe(prepared, request, decided - started)
            if prepared.late is not None:
                self._preparer.follow(prepared, partial(self._learned, request))
            yield request
        finally:
            self._close(request)

    async def explain(
        self, path: str, body: bytes, *, session: str | None = None, headers: Mapping[str, str] = NO_HEADERS
    ) -> dict[str, object]:
        """What `dispatch` would decide now, as JSON-able data. Changes nothing; raises the same errors."""
        prepared = await self._preparer.prepare(path, body, request_id="dry-run", session=session, headers=headers)
        started = self._clock()
        decision = self._scheduler.schedule(prepared.request, self._candidates.snapshot(prepared), dry_run=True)
        timings_ms = {**prepared.timings_ms, "schedule": (self._clock() - started) * 1000}
        return record(
            decision,
            path,
            prepared.notes,
            timings_ms,
            pods=None,
            limits_of=self._candidates.limits_of,
        ).view()

    def forget(self, endpoint: str) -> None:
        """An endpoint has gone: drop what was counted and remembered about it."""
        self._load.forget(endpoint)
        self._history.forget(endpoint)
        self._candidates.forget(endpoint)
        self._outliers.forget(endpoint)
        self._auditor.forget(endpoint)
        self._metrics.forget_pod(endpoint)
        if self._watch is not None:
            self._watch.forget(endpoint)

    def keep_models(self) -> None:
        """Forget the models that no pod serves any more."""
        served = self._registry.names()
        self._auditor.keep_models(served)
        self._metrics.keep_models(served)
        if self._ladder is not None:
            self._ladder.keep_models(served)

    async def _admitted(self, prepared: Prepared, ticket: Ticket, stages: Stages | None) -> Prepared:
        """The request once it is admitted. Where that took a while, pods and matches are those of now."""
        began = self._clock()
        try:
            has_waited = await ticket.admit(demand_of(prepared))
        finally:
            ended = self._clock()
            if stages is not None:
                stages.add("admission", began, ended)
        return await self._preparer.again(prepared, waited=ended - began, stages=stages) if has_waited else prepared

    def _decide(self, prepared: Prepared, path: str) -> InFlight:
        decision = self._scheduler.schedule(prepared.request, self._candidates.snapshot(prepared))
        kept = record(decision, path, prepared.notes, prepared.timings_ms, limits_of=self._candidates.limits_of)
        self._decisions.add(kept)
        charge_at = partial(self._charge, prepared.request, is_timed=not prepared.prompt.opaque)
        charged = charge_at(decision.chosen)
        try:
            audit = self._auditor.open(prepared, decision.chosen)
        except BaseException:
            charged.cancel()
            raise
        return InFlight(
            prepared,
            decision,
            registry=self._registry,
            outliers=self._outliers,
            charge=charged,
            charge_at=charge_at,
            audit=audit,
            record=kept,
        )

    def _charge(self, request: SchedulingRequest, pod: Candidate, *, is_timed: bool = True) -> Charge:
        """Count the request at an endpoint, with the blocks that it brings there. `is_timed`: it computes a prompt."""
        charged = charge(self._load, request, pod)
        if not is_timed:
            charged.untimed()
        return charged

    def _learned(self, request: InFlight, late: Prepared) -> None:
        """The token ids have come after the decision: put them into the accounts, wherever the request is by now."""

        def here() -> Candidate | None:
            name = request.pod.name
            return next((each for each in self._candidates.snapshot(late) if each.name == name), None)

        if request.learned(late, here, partial(self._charge, late.request)) and request.is_over:
            self._remember(request)

    def _remember(self, request: InFlight) -> None:
        """Remember where a prompt was computed."""
        if request.computed:
            pod, scheduled = request.pod, request.request
            self._history.computed(
                pod.name,
                scheduled.model,
                scheduled.chain,
                is_exact=pod.trust == "exact",
                chunks=scheduled.chunks,
            )

    def _close(self, request: InFlight) -> None:
        """The request is over: settle what it held, and forget endpoints that have gone meanwhile."""
        try:
            request.close()
            self._remember(request)
            if self._watch is not None:
                self._watch.ended(request.record)
            if self._ladder is not None:
                self._ladder.ended(request)
        finally:
            for each in request.tried:
                if not self._registry.has(each.pod, each.name):
                    self.forget(each.name)

    def _observe(self, prepared: Prepared, in_flight: InFlight, seconds: float) -> None:
        request, decision = prepared.request, in_flight.decision
        chosen = decision.chosen
        self._metrics.decided(chosen.name, seconds, prepared.timings_ms)
        if self._watch is not None:
            self._watch.decided(in_flight.record, decision)
        if prepared.way.route is not None:
            self._metrics.route_taken(prepared.way.route.name, prepared.way.route.label)
        for reason in prepared.degraded:
            self._metrics.degraded(reason.value)
        if request.prompt_tokens is not None:
            hit = chosen.predicted_hit(request.prompt_tokens, request.block_size)
            self._metrics.predicted(request.prompt_tokens, hit)
