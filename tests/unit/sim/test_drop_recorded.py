"""An engine that drops the last block of each hit: no event says so, and a few answers teach it."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.sim.attention import Group, Layout
from matrixinfer.sim.cache import PagedPrefixCache
from matrixinfer.trust.drop import Drops
from tests.unit.kvevents.support import POD, Follower
from tests.unit.kvevents.test_reuse_model import predicted

from .recorded import Row, Shape, record

SIZE = 16


class Asked:
    """What the gateway predicts of a recording, request by request."""

    def __init__(self, kind: list[str], seed: int) -> None:
        self._layout = Layout(groups=tuple(Group.parse(text, SIZE) for text in kind), drop=True)
        cache = PagedPrefixCache(70 * len(kind), SIZE, layout=self._layout)
        self._rows = record(cache, seed=seed, shape=Shape(longest=10 * SIZE, adapters=0, unit=SIZE), meta={})
        self.follower = Follower(TokenBlockProcessor(SIZE))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Prediction and answer of each request."""
        expected = 0
        for row in self._rows:
            if row["kind"] == "event":
                self.follower.apply(*msgspec.msgpack.decode(bytes.fromhex(row["payload_hex"]))[1])
            elif row["kind"] == "request":
                expected = self._predicted(row)
            elif row["kind"] == "response":
                yield expected, row["usage"]["prompt_tokens_details"]["cached_tokens"]

    def _predicted(self, row: Row) -> int:
        rules, tokens = self.follower.ledger.rules, tuple(row["prompt_token_ids"])
        found = predicted(self.follower, row["body"].get("cache_salt"), tokens, self._layout.unit)
        return max(0, found - rules.drop) if rules.rule is None else found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["full", "mla"])
def test_once_the_drop_is_learnt_from_answers_every_hit_is_predicted(kind: str, seed: int) -> None:
    asked, drops = Asked([kind], seed), Drops()
    ledger, compared, wrong = asked.follower.ledger, 0, 0
    for expected, cached in asked:
        if ledger.rules.drop_is_settled:
            assert expected == cached
            compared += cached > 0
        else:
            wrong += expected != cached
            drops.explains(POD, ledger, predicted=expected, cached=cached)
    assert ledger.rules.drop == SIZE
    assert 3 <= wrong < 20
    assert compared > 15


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [["full", "sliding:100"], ["full", "mamba"], ["mla", "sliding_mla:40", "mamba"]])
def test_once_the_drop_of_several_groups_is_known_every_hit_is_predicted(kind: list[str], seed: int) -> None:
    asked = Asked(kind, seed)
    ledger, compared = asked.follower.ledger, 0
    for number, (expected, cached) in enumerate(asked):
        if number == 50:
            assert ledger.drop_more() == SIZE
        if number > 50:
            assert expected == cached
            compared += cached > 0
    assert compared > 5
