"""Learns whether an engine drops a block of every hit, which no event says.

vLLM up to 0.32 (and 0.33 with `disable_lookahead_block_hashes`) with EAGLE or MTP gives up the last block of what it finds in
its cache. Answers show it: each reports one block less than predicted. After `RUN` such answers in a row the drop is
known, and predictions count with it; after as many that report one block more it is taken back. As many that report
just what was predicted settle it until the feed starts again: from then on an answer with less shows blocks that the
index claims wrongly. An answer without any hit says nothing about a drop.

Where token blocks are larger than the engine's, a prediction ends with a whole token block, and the engine may hold up to
a token block more. Then an answer with as much as predicted, or more, is no proof against a drop, unless it reports the
longest hit that the prompt allows: an engine that drops never does.

With states of mamba, a dropped block can cost any part of a hit, or all of it, as the next state may lie far before. So
there the drop is tried: after `RUN` answers with less, of any size, predictions count with it, until `RUN` answers report
more. If that does not help either, it is not the reason.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import structlog

from matrixinfer.kvevents.ledger import Ledger

RUN = 3
"""Answers in a row that differ from the prediction in the same way."""

_Sign: TypeAlias = Literal[-1, 0, 1]

log = structlog.get_logger(__name__)


class Drops:
    """What answers have shown of every endpoint's drop."""

    def __init__(self) -> None:
        self._runs: dict[
            str, tuple[_Sign, int]
        ] = {}  # endpoint -> a block less (1), more (-1) or equal (0), and how often

    def __len__(self) -> int:
        """Endpoints remembered."""
        return len(self._runs)

    def explains(
        self, endpoint: str, ledger: Ledger, *, predicted: int, cached: int, longest: int | None = None
    ) -> bool:
        """Whether a drop may be why an answer reports `cached` tokens where `predicted` were expected.

        `longest` is the longest hit that the prompt allows, where the engine may hold more than was predicted; None where
        the prediction is to the engine's block. Learns from it: after `RUN` equal differences in a row the ledger counts
        with the drop, or without; after `RUN` answers as predicted nothing is learned, or explained, any more.
        """
        block, rules = ledger.drop_unit, ledger.rules
        if rules.drop_is_settled:
            return False
        if rules.has_states:
            return self._tried(endpoint, ledger, predicted=predicted, cached=cached)
        if not cached:
            return False
        if longest is not None and cached >= predicted:
            if cached == longest:
                predicted = cached - block if ledger.drops else cached
            elif cached > predicted or not ledger.drops:
                return False
        if not block or predicted - cached not in (block, 0, -block):
            self._runs.pop(endpoint, None)
            return False
        sign: _Sign = 1 if cached < predicted else -1 if cached > predicted else 0
        last, count = self._runs.get(endpoint, (sign, 0))
        count = count + 1 if last == sign else 1
        self._runs[endpoint] = sign, count
        if sign < 0 and not ledger.drops:
            return False
        if count >= RUN:
            del self._runs[endpoint]
            if sign:
                dropped = ledger.drop_more() if sign > 0 else ledger.drop_nothing()
                log.info("block_drop_learned", endpoint=endpoint, tokens=dropped)
            else:
                rules.drop_is_settled = True
        return sign != 0

    def _tried(self, endpoint: str, ledger: Ledger, *, predicted: int, cached: int) -> bool:
        """As `explains`, with states of mamba."""
        if not predicted or (cached > predicted and not ledger.drops):
            return False
        sign: _Sign = 1 if cached < predicted else -1 if cached > predicted else 0
        last, count = self._runs.get(endpoint, (sign, 0))
        if not sign:  # most answers are the same with a drop as without
            return False
        count = count + 1 if last == sign else 1
        self._runs[endpoint] = sign, count
        if count >= RUN:
            del self._runs[endpoint]
            if sign > 0 and not ledger.drops:
                log.info("block_drop_learned", endpoint=endpoint, tokens=ledger.drop_more())
            else:
                dropped, ledger.rules.drop_is_settled = ledger.drop_nothing(), True
                log.info("block_drop_learned", endpoint=endpoint, tokens=dropped)
        return True

    def forget(self, endpoint: str) -> None:
        """The endpoint has gone."""
        self._runs.pop(endpoint, None)
