"""The hit that the index predicts for one request at one endpoint, followed until the engine has answered.

A prediction can shrink between the decision and the answer: what is evicted while the request waits is no fault of the
index. So the blocks that it rests on are watched until the first byte, and drift is judged between both values.

The event of such an eviction may come after the first byte, together with those of the blocks that the request itself
computed again. So an answer that reports less goes on being watched for a short time before it counts against the
index (`Drift.suspected`). While a request runs, its engine evicts no block that the request found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

from matrixinfer.kvevents.supports import Supports, Watch
from matrixinfer.trust.drift import Drift


class Unwatched:
    """A predicted hit of `tokens` at an endpoint whose events another process follows."""

    __slots__ = ("_drift", "_endpoint", "_tokens")

    def __init__(self, drift: Drift, endpoint: str, tokens: int) -> None:
        self._drift = drift
        self._endpoint = endpoint
        self._tokens = tokens

    def first_byte(self) -> None:
        """The answer begins."""

    def reported(self, cached: int | None) -> None:
        """The answer reports `cached` tokens; None if it does not say how many."""
        self._drift.observed(self._endpoint, predicted=self._tokens, cached=cached)

    def end(self, *, computed: bool) -> None:
        """The request is over."""


class Prediction:
    """A predicted hit of `tokens` out of `prompt_tokens`, in whole engine blocks. Call `open` first and `end` last.

    The hit reaches into `matched`, token blocks of `token_block` tokens. `stores` is a block that the engine must hold
    once it has computed the prompt, if one can be named. The engine cuts each hit by `dropped` tokens. `explains` says whether a report of cached tokens differs from
    the prediction for a reason that is no fault of the index (`trust.drop`).
    """

    __slots__ = (
        "_at_first_byte",
        "_drift",
        "_dropped",
        "_endpoint",
        "_explains",
        "_matched",
        "_model",
        "_prompt_tokens",
        "_sent_at",
        "_stores",
        "_supports",
        "_token_block",
        "_watch",
        "tokens",
    )

    def __init__(
        self,
        drift: Drift,
        endpoint: str,
        *,
        tokens: int,
        prompt_tokens: int,
        supports: Supports,
        model: str,
        matched: Sequence[int],
        token_block: int,
        stores: int | None,
        dropped: int,
        explains: Callable[[int, int], bool],
    ) -> None:
        self.tokens = self._at_first_byte = tokens
        self._drift = drift
        self._endpoint = endpoint
        self._prompt_tokens = prompt_tokens
        self._supports = supports
        self._model = model
        self._matched = matched
        self._token_block = token_block
        self._stores = stores
        self._dropped = dropped
        self._explains = explains
        self._sent_at = float("inf")
        self._watch: Watch | None = None

    def open(self) -> Self:
        """The request is sent now: watch the blocks that the hit rests on. Returns the prediction itself."""
        self._sent_at = self._drift.now()
        if self._matched:
            self._watch = self._supports.watch(self._model, self._matched)
        return self

    def first_byte(self) -> None:
        """The answer begins: blocks evicted before now were not there to be found, even if they are stored again."""
        self._at_first_byte = self._left()
        self._drift.began(self._endpoint, sent_at=self._sent_at, least=self._at_first_byte, tokens=self._prompt_tokens)

    def reported(self, cached: int | None) -> None:
        """The answer reports `cached` tokens; None if it does not say how many."""
        if cached is not None and self._at_first_byte == self.tokens and self._explains(self.tokens, cached):
            return
        watch, self._watch = self._watch, None
        least, most = self._at_first_byte, self.tokens
        if watch is not None and (cached or 0) < least:
            self._drift.suspected(self._endpoint, least=lambda: min(least, self._end(watch)), most=most, cached=cached)
            return
        self._end(watch)
        self._drift.reported(self._endpoint, least=least, most=most, cached=cached)

    def end(self, *, computed: bool) -> None:
        """The request is over, or goes to another endpoint. `computed`: this one has computed the prompt."""
        watch, self._watch = self._watch, None
        self._end(watch)
        stores, supports, model = self._stores, self._supports, self._model
        if computed and stores is not None:
            self._drift.awaits(self._endpoint, lambda: supports.held(model, (stores,)) > 0)

    def _left(self, watch: Watch | None = None) -> int:
        """Tokens of the predicted hit whose blocks have been there since the request was sent."""
        watch = watch or self._watch
        if watch is None or watch.left >= len(self._matched):
            return self.tokens
        return min(self.tokens, max(0, watch.left * self._token_block - self._dropped))

    def _end(self, watch: Watch | None) -> int:
        """End a watch. Returns what is left of the predicted hit."""
        if watch is None:
            return self.tokens
        self._supports.unwatch(watch)
        return self._left(watch)
