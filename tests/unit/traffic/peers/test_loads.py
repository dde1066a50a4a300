from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.traffic.peers.loads import MAX_PEERS, SILENT_SECONDS, PeerLoads
from matrixinfer.traffic.peers.message import Load


def test_loads_of_all_peers_add_up_and_the_last_of_each_counts() -> None:
    loads = PeerLoads()
    assert loads.update("x", {"a": Load(2, 100), "b": Load(1, 0)}, 0.0)
    assert loads.update("y", {"a": Load(1, 10)}, 0.0)
    assert loads.totals(0.0) == {"a": Load(3, 110), "b": Load(1, 0)}
    loads.update("x", {"b": Load(4, 5)}, 1.0)
    assert loads.totals(1.0) == {"a": Load(1, 10), "b": Load(4, 5)}
    assert loads.count(1.0) == 2


def test_the_load_of_a_silent_peer_is_dropped() -> None:
    loads = PeerLoads()
    loads.update("x", {"a": Load(2, 100)}, 0.0)
    loads.update("y", {"a": Load(1, 0)}, 1.0)
    loads.update("x", {"a": Load(3, 0)}, 2.0)
    assert loads.totals(1.0 + SILENT_SECONDS - 0.01) == {"a": Load(4, 0)}
    assert loads.totals(1.0 + SILENT_SECONDS) == {"a": Load(3, 0)}
    assert loads.totals(2.0 + SILENT_SECONDS) == {}
    assert loads.count(2.0 + SILENT_SECONDS) == 0


def test_peers_beyond_the_bound_are_ignored_until_one_has_gone() -> None:
    loads = PeerLoads()
    accepted = [loads.update(str(number), {"a": Load(1, 0)}, 0.0) for number in range(MAX_PEERS + 1)]
    assert accepted == [True] * MAX_PEERS + [False]
    assert loads.totals(0.0) == {"a": Load(MAX_PEERS, 0)}
    assert loads.update("0", {}, 1.0)
    assert loads.update("another", {}, SILENT_SECONDS)


Report = tuple[str, Mapping[str, Load], float]


@given(
    st.lists(
        st.tuples(
            st.sampled_from("xyz"),
            st.dictionaries(st.sampled_from("abc"), st.builds(Load, st.integers(0, 3), st.integers(0, 9))),
            st.floats(0, 2),
        ),
        max_size=30,
    )
)
def test_totals_are_the_sum_of_recent_reports(reports: list[Report]) -> None:
    loads, last, now = PeerLoads(), dict[str, tuple[float, Mapping[str, Load]]](), 0.0
    for peer, load, later in reports:
        now += later
        loads.update(peer, load, now)
        last[peer] = now, load
        alive = [load for reported_at, load in last.values() if now < reported_at + SILENT_SECONDS]
        for name in "abc":
            found = loads.totals(now).get(name, Load(0, 0))
            assert found.in_flight == sum(load[name].in_flight for load in alive if name in load)
            assert found.queued_tokens == sum(load[name].queued_tokens for load in alive if name in load)
        assert loads.count(now) == len(alive)
