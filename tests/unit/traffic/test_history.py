from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.traffic.history import RoutingHistory

CHAIN = [11, 12, 13, 14]


def test_sent_blocks_match_from_the_start() -> None:
    history = RoutingHistory()
    history.record_sent("a", "m", CHAIN[:3])
    assert [history.match("a", "m", prompt) for prompt in (CHAIN, CHAIN[:2], [11, 99, 13], [99, 12])] == [3, 2, 1, 0]
    assert history.match("b", "m", CHAIN) == history.match("a", "lora", CHAIN) == 0


def test_a_dropped_block_ends_the_match() -> None:
    history = RoutingHistory()
    history.record_sent("a", "m", CHAIN)
    history.drop("a", "lora", [11])
    history.drop("b", "m", [11])
    assert history.match("a", "m", CHAIN) == 4
    history.drop("a", "m", [13, 77])
    assert history.match("a", "m", CHAIN) == 2


def test_an_endpoint_is_forgotten_completely() -> None:
    history = RoutingHistory()
    history.record_sent("a", "m", CHAIN)
    history.record_sent("b", "m", [])
    assert "a" in history
    assert "b" not in history
    history.forget("a")
    history.forget("a")
    assert "a" not in history
    assert len(history) == 0


def test_the_oldest_blocks_are_evicted_first_and_ends_of_prompts_before_their_starts() -> None:
    history = RoutingHistory(max_blocks=6)
    history.record_sent("a", "m", CHAIN)
    history.record_sent("a", "m", [21, 22])
    history.record_sent("a", "m", CHAIN[:2])
    history.record_sent("a", "m", [31])
    assert [history.match("a", "m", prompt) for prompt in (CHAIN, [21, 22], [31])] == [3, 2, 1]


def test_a_prompt_larger_than_the_share_is_remembered_by_its_start() -> None:
    history = RoutingHistory(max_blocks=3)
    history.record_sent("a", "m", CHAIN)
    assert history.match("a", "m", CHAIN) == 3


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.integers(0, 12)), max_size=40),
)
def test_history_is_bounded_over_all_endpoints_and_keeps_prefixes(sent: list[tuple[str, int, int]]) -> None:
    history = RoutingHistory(max_blocks=30)
    for name, prompt, length in sent:
        chain = [100 * prompt + block for block in range(length)]
        history.record_sent(name, "m", chain)
        assert history.match(name, "m", chain) >= min(length, 10)
        assert len(history) <= 30
    for name in "abc":
        history.forget(name)
    assert len(history) == 0


def test_new_endpoints_take_space_from_the_largest_one() -> None:
    history = RoutingHistory(max_blocks=12)
    history.record_sent("a", "m", range(12))
    for name in "bcd":
        history.record_sent(name, "m", range(3))
    assert [history.match(name, "m", range(12)) for name in "abcd"] == [3, 3, 3, 3]
    history.drop("b", "m", range(3))
    assert "b" not in history
    assert len(history) == 9


def test_a_subscriber_is_called_for_prompts_of_this_gateway_only() -> None:
    history, sent = RoutingHistory(), list[tuple[str, str, list[int], bool]]()

    def on_sent(name: str, model: str, hashes: Sequence[int], by_bytes: bool) -> None:
        sent.append((name, model, list(hashes), by_bytes))

    unsubscribe = history.subscribe(on_sent)
    history.record_sent("a", "m", CHAIN)
    history.record_reported("b", "m", CHAIN)
    history.computed("a", "m", CHAIN, is_exact=True, chunks=[7])
    assert sent == [("a", "m", CHAIN, False), ("a", "m", [7], True)]
    unsubscribe()
    history.record_sent("a", "m", CHAIN)
    assert len(sent) == 2


def test_chunks_are_kept_beside_blocks_and_also_where_events_say_all() -> None:
    history = RoutingHistory(max_blocks=6)
    history.computed("a", "m", CHAIN, is_exact=False, chunks=CHAIN)
    history.computed("a", "m", CHAIN, is_exact=True, chunks=[*CHAIN, 15])
    assert (history.match("a", "m", CHAIN), history.match_chunks("a", "m", [*CHAIN, 15, 16])) == (0, 5)
    assert history.match_chunks("a", "lora", CHAIN) == history.match_chunks("b", "m", CHAIN) == 0
    history.drop("a", "m", CHAIN)  # events name blocks
    assert (len(history), history.chunks, "a" in history) == (0, 5, True)
    history.computed("b", "m", (), is_exact=True, chunks=range(50))
    assert history.chunks == 6
    history.forget("a")
    history.forget("b")
    assert (history.chunks, "a" in history, "b" in history) == (0, False, False)
