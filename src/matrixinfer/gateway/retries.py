"""Decides whether a request is sent to another pod, and waits before it is."""

from __future__ import annotations

import asyncio
import random

from matrixinfer.config import RetriesConfig
from matrixinfer.gateway.pod_connection import AttemptFailed
from matrixinfer.traffic.retry_budget import RetryBudget


class Retries:
    """The rules for all requests, and what they share: one budget."""

    def __init__(self, config: RetriesConfig, budget: RetryBudget, rng: random.Random) -> None:
        self._config = config
        self._budget = budget
        self._rng = rng

    def reconfigure(self, config: RetriesConfig) -> None:
        """Follow these rules from the next request on."""
        self._config = config
        self._budget.reconfigure(config.budget_share, config.budget_per_second)

    def begin(self) -> Retry:
        """The retries of a new request."""
        self._budget.requested()
        return Retry(self._config, self._budget, self._rng)


class Retry:
    """The retries of one request."""

    __slots__ = ("_budget", "_config", "_count", "_rng", "_sent")

    def __init__(self, config: RetriesConfig, budget: RetryBudget, rng: random.Random) -> None:
        self._config = config
        self._budget = budget
        self._rng = rng
        self._count = 0
        self._sent = 0
        """Pods that received the request and did not answer it."""

    @property
    def was_sent(self) -> bool:
        """Whether a pod has received the request and not answered it."""
        return self._sent > 0

    @property
    def may_send_again(self) -> bool:
        """Whether another pod may get the request if the present one, which has received it, does not answer."""
        return self._sent < self._config.after_send

    def after_failure(self, failure: AttemptFailed) -> bool:
        """Whether another pod gets the request after this failure. A pod that was not reached had no work: that is free."""
        if not failure.was_sent:
            return True
        if failure.kind == "timeout" or not self.may_send_again:
            return False  # after a timeout the client has waited long enough
        self._sent += 1
        return self._budget.take()

    def after_status(self, status: int, *, needs_witness: bool) -> bool:
        """Whether another pod gets the request instead of an answer with this status.

        `needs_witness`: the pod has failed so often that another one's answer is to show whether the request is to blame.
        """
        is_retried = status in self._config.statuses
        if not (is_retried or needs_witness) or not self._budget.take():
            return False
        self._sent += not is_retried  # it may be what breaks engines
        return True

    async def pause(self) -> None:
        """Wait for a random time, so that requests that fail together do not come back together."""
        longest = self._config.jitter_seconds * 2**self._count
        self._count += 1
        if longest:
            await asyncio.sleep(self._rng.uniform(0, longest))
