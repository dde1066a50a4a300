from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.index.holders import walk
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.index.room import is_roomy
from matrixinfer.testing.index_oracle import ENDS, MODELS, PODS, Model, Operation, Tree, histories, name_of, trees

A, B, C = ([name_of(100 * chain + node) for node in range(10)] for chain in (1, 2, 3))


@pytest.fixture(scope="module", autouse=True, params=[None, 3], ids=["one dict per table", "many dicts per table"])
def unsharded_blocks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Shard all trees, so that every test also covers large trees."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param is not None:
            patch.setattr("matrixinfer.index.tree._UNSHARDED_BLOCKS", request.param)
            patch.setattr("matrixinfer.index.tree._SHARD_EVERY", 1)
            patch.setattr("matrixinfer.index.tree._SHARDS", (2, 3, 5, 7, 2))
        yield


def held(index: MemoryIndex, chain: list[int], pod: str = "pod-a", model: str = "llama") -> int:
    return index.count(model, chain).get(pod, 0)


def kept(index: MemoryIndex, chain: list[int], model: str = "llama") -> int:
    """The longest prefix that any pod holds."""
    return max(index.count(model, chain).values(), default=0)


# Eviction


@st.composite
def stores(draw: st.DrawFn) -> tuple[Tree, list[tuple[str, str, int]]]:
    tree = draw(trees())
    store = st.tuples(st.sampled_from(MODELS), st.sampled_from(PODS), st.integers(0, len(tree.parents) - 1))
    return tree, draw(st.lists(store, max_size=30))


@given(stores(), st.integers(1, 12))
def test_a_full_index_keeps_its_bound_and_only_prefixes(
    stored: tuple[Tree, list[tuple[str, str, int]]], bound: int
) -> None:
    tree, adds = stored
    index = MemoryIndex(max_blocks=bound)
    for model, pod, node in adds:
        chain = tree.path(node)
        before, new = index.stats(), len(chain) - kept(index, chain, model)
        index.add(model, pod, chain, None)
        after = index.stats()
        assert after.blocks == min(bound, before.blocks + new)
        assert after.blocks + after.evicted == before.blocks + before.evicted + new
        paths = [(name, tree.path(leaf)) for name in MODELS for leaf in range(len(tree.parents))]
        reachable = {(name, block) for name, path in paths for block in path[: kept(index, path, name)]}
        assert len(reachable) == after.blocks, "a block is kept that no prompt can reach"


@given(histories(), st.integers(1, 12))
def test_galloping_equals_walking(history: tuple[Tree, list[Operation]], bound: int) -> None:
    tree, operations = history
    index = MemoryIndex(max_blocks=bound)
    model = Model(tree, prefix_closed=True)
    for operation in operations:
        model.apply(operation, index)
        for name, blocks in index._trees.items():
            for node in range(len(tree.parents)):
                chain = tree.path(node)
                counts = index.count(name, chain)
                walked = walk(blocks, chain, index._sets.live)
                assert counts == {pod: count for bits, count in walked for pod in index._sets.names(bits)}
                true = model.count(name, chain)
                assert all(count <= true.get(pod, 0) for pod, count in counts.items())
        assert index.stats().blocks <= bound


@given(histories(), st.integers(1, 6), st.booleans())
def test_a_full_index_finds_the_last_of_the_blocks_that_it_kept(
    history: tuple[Tree, list[Operation]], bound: int, prefix_closed: bool
) -> None:
    tree, operations = history
    index = MemoryIndex(max_blocks=bound, prefix_closed=prefix_closed)
    model = Model(tree, prefix_closed=True)
    every = [*map(name_of, range(len(tree.parents)))]
    for operation in operations:
        model.apply(operation, index)
        kept_ends: set[tuple[str, int]] = set()
        for name in MODELS:
            expected = {}
            for pod in (*PODS, *ENDS):
                places = [place for place, block in enumerate(every) if index.last_of(name, [pod], [block])]
                assert {every[place] for place in places} <= model.held[name, pod]
                if places:
                    expected[pod] = places[-1]
                if pod in ENDS:
                    kept_ends.update((name, place) for place in places)
            assert index.last_of(name, (*PODS, *ENDS), every) == expected
            assert not index.count(name, every).keys() & set(ENDS)
        assert len(kept_ends) <= bound


def test_ends_have_a_bound_of_their_own() -> None:
    index = MemoryIndex(max_blocks=10)
    index.add("llama", "pod-a", A, None)
    for chain in (A, B):
        index.add("llama", "pod-a~ends", chain, None)
    assert held(index, A) == index.stats().blocks == 10
    assert index.stats().evicted == 10
    assert index.last_of("llama", ["pod-a~ends"], [*B, *A]) == {"pod-a~ends": 9}


def test_the_least_recently_stored_branch_is_evicted_first_from_its_end() -> None:
    index = MemoryIndex(max_blocks=20)
    index.add("llama", "pod-a", A, None)
    index.add("llama", "pod-a", B, None)
    index.add("llama", "pod-b", A, None)  # A is fresher than B now
    index.add("llama", "pod-a", C[:4], None)
    assert (held(index, A), held(index, B), held(index, C)) == (10, 6, 4)
    assert index.stats().evicted == 4


def test_a_shared_prefix_outlives_its_older_branches() -> None:
    index = MemoryIndex(max_blocks=10)
    prefix, old, new = A[:5], B[:5], C[:5]
    index.add("llama", "pod-a", prefix + old, None)
    index.add("llama", "pod-b", prefix + new, None)
    assert index.count("llama", prefix + old) == {"pod-a": 5, "pod-b": 5}
    assert index.count("llama", prefix + new) == {"pod-a": 5, "pod-b": 10}


def test_the_rest_of_a_branch_keeps_its_age() -> None:
    index = MemoryIndex(max_blocks=20)
    index.add("llama", "pod-a", A, None)
    index.add("llama", "pod-a", B, None)
    index.remove("llama", "pod-a", A[5:])
    index.add("llama", "pod-a", C[:8], None)
    assert (held(index, A), held(index, B), held(index, C)) == (2, 10, 8)


@pytest.mark.parametrize("branches", [2, 3, 4])
def test_a_fork_that_lost_all_its_branches_can_be_evicted(branches: int) -> None:
    index = MemoryIndex(max_blocks=10)
    index.add("llama", "pod-a", A[:1], None)
    for branch in A[1 : branches + 1]:
        index.add("llama", "pod-a", [branch], A[0])
    index.remove("llama", "pod-a", A[1 : branches + 1])
    assert index.stats().blocks == 1
    index.add("llama", "pod-a", B, None)
    assert (held(index, A), held(index, B)) == (0, 10)


def test_a_chain_longer_than_the_bound_keeps_its_beginning() -> None:
    index = MemoryIndex(max_blocks=4)
    index.add("llama", "pod-a", A, None)
    assert held(index, A) == 4


def test_blocks_after_an_evicted_block_are_ignored() -> None:
    index = MemoryIndex(max_blocks=4)
    index.add("llama", "pod-a", A, None)
    index.add("llama", "pod-a", B, A[-1])
    index.add("qwen", "pod-b", B, A[-1])
    assert (index.stats().blocks, index.stats().pods) == (4, 1)
    assert set(index._trees) == {"llama"}


def test_models_that_lost_their_last_block_are_dropped() -> None:
    index = MemoryIndex(max_blocks=1)
    for model in ("m0", "m1", "m2", "m3"):
        index.add(model, "pod-a", A[:1], None)
    assert len(index._trees) == 1
    index.remove(next(iter(index._trees)), "pod-a", A[:1])
    assert (index.stats().blocks, len(index._trees)) == (0, 0)


def test_independent_blocks_are_evicted_oldest_first() -> None:
    index = MemoryIndex(max_blocks=4, prefix_closed=False)
    index.add("llama", "pod-a", A[:3], None)
    index.add("llama", "pod-a", A[:1], None)
    index.add("llama", "pod-a", B[:3], None)
    assert (held(index, A[:1]), held(index, A[1:2]), held(index, B)) == (1, 0, 3)


def test_a_bound_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="max_blocks"):
        MemoryIndex(max_blocks=0)


# Cleared pods


def test_later_writes_reclaim_the_blocks_of_a_cleared_pod() -> None:
    index = MemoryIndex()
    index.add("llama", "pod-a", A, None)
    index.add("qwen", "pod-a", B, None)
    index.add("llama", "pod-b", A[:5], None)
    index.clear("pod-a")
    for _ in range(4):
        index.add("llama", "pod-b", C[:1], None)
    assert index.stats().blocks == 6
    assert set(index._trees) == {"llama"}


def test_the_bits_of_cleared_pods_are_used_again() -> None:
    index = MemoryIndex()
    for turn in range(300):
        index.add("llama", f"pod-{turn}", A, None)
        index.forget(f"pod-{turn}")
    assert index._sets._next.bit_length() < 100
    assert index.count("llama", A) == {}


def test_the_bits_of_cleared_pods_are_used_again_while_others_stay() -> None:
    index = MemoryIndex()
    index.add("llama", "stays", B, None)
    for turn in range(300):
        index.add("llama", f"pod-{turn}", A, None)
        index.forget(f"pod-{turn}")
    assert index._sets._next.bit_length() < 100
    assert index.count("llama", B) == {"stays": len(B)}


def test_clearing_the_last_pod_empties_the_index() -> None:
    index = MemoryIndex()
    pods = [f"pod-{number}" for number in range(200)]
    for pod in pods:
        index.add("llama", pod, A, None)
    for pod in pods[:-1]:
        index.clear(pod)
    assert index.count("llama", A) == {pods[-1]: len(A)}
    index.clear(pods[-1])
    assert (index.stats().blocks, index.stats().pods, index._trees, index._sets.has_dead) == (0, 0, {}, False)
    index.add("llama", "new", A[:2], None)
    assert index.count("llama", A) == {"new": 2}


def test_the_blocks_of_the_last_pod_are_freed_gradually_by_later_writes() -> None:
    index = MemoryIndex()
    for start in range(0, 20_000, 1_000):
        index.add("llama", "pod-a", [name_of(node) for node in range(start, start + 1_000)], None)
    sizes = []
    index.clear("pod-a")
    while index._dropped:
        index.add("llama", "pod-b", C[:1], None)
        sizes.append(index.stats().memory_bytes)
    assert len(sizes) > 3
    assert sizes == sorted(sizes, reverse=True)
    assert index.count("llama", C) == {"pod-b": 1}


def test_a_new_pod_does_not_inherit_the_blocks_of_the_previous_owner_of_its_bit() -> None:
    index = MemoryIndex()
    index.add("llama", "pod-a", A, None)
    index.add("llama", "pod-b", A, None)
    bit = index._sets.bit("pod-a")
    index.clear("pod-a")
    index.add("llama", "pod-b", B, None)
    index.add("llama", "pod-b", B, None)
    index.add("llama", "pod-c", A[:3], None)
    assert index._sets.bit("pod-c") == bit
    assert index.count("llama", A) == {"pod-b": 10, "pod-c": 3}


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 10), st.booleans()), max_size=200))
def test_pods_that_come_and_go_have_the_blocks_they_stored_last(turns: list[tuple[int, int, bool]]) -> None:
    index = MemoryIndex()
    expected: dict[str, int] = {}
    for number, blocks, leaves in turns:
        pod = f"pod-{number}"
        if leaves:
            index.forget(pod)
            expected.pop(pod, None)
        elif blocks:
            index.add("llama", pod, A[:blocks], None)
            expected[pod] = max(blocks, expected.get(pod, 0))
        assert index.count("llama", A) == expected


# Memory


@pytest.mark.parametrize("prefix_closed", [True, False])
def test_no_dict_of_a_large_tree_is_large_enough_to_block_the_loop(prefix_closed: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matrixinfer.index.tree._UNSHARDED_BLOCKS", 1_000)
        patch.setattr("matrixinfer.index.tree._SHARD_EVERY", 100)
        patch.setattr("matrixinfer.index.tree._SHARDS", (512, 609, 724, 861, 512))
        index = MemoryIndex(prefix_closed=prefix_closed)
        for start in range(0, 50_000, 100):
            index.add("llama", "pod-a", [name_of(node) for node in range(start, start + 100)], None)
    tables = index._trees["llama"]._tables()
    assert max(len(shard) for shard in tables[0]) < 300
    assert max(len(shard) for table in tables for shard in table) <= 1_100


@pytest.mark.parametrize("bound", [4_000_000, 12_000])
def test_few_dicts_keep_room_for_blocks_that_are_gone(bound: int) -> None:
    """Whether pods remove the blocks, or the bound of the index does."""
    index = MemoryIndex(max_blocks=bound)
    for start in range(0, 60_000, 50):
        index.add("llama", "pod-a", [name_of(node) for node in range(start, start + 50)], None)
        if start >= 12_000 < bound:
            old = range(start - 12_000, start - 11_950)
            index.remove("llama", "pod-a", [name_of(node) for node in reversed(old)])
    assert index.stats().blocks == 12_000
    tree = index._trees["llama"]
    shards = [shard for table in tree._tables()[:2] for shard in table]
    assert sum(map(is_roomy, shards)) < len(shards) / 3


def test_equal_sets_of_pods_share_one_object() -> None:
    index = MemoryIndex()
    for number in range(100):  # more than the integers that Python itself shares
        index.add("llama", f"pod-{number}", A, None)
    sets = {id(pods) for shard in index._trees["llama"].pods for pods in shard.values()}
    assert len(sets) == 1


def test_the_table_of_shared_sets_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matrixinfer.index.pod_sets._SHARED_KEPT", 8)
    index = MemoryIndex()
    for number in range(40):
        index.add("llama", f"pod-{number}", A[: 1 + number % 10], None)
    assert len(index._sets._shared) <= 8
    assert len(index.count("llama", A)) == 40


def test_statistics_estimate_memory() -> None:
    small, large = MemoryIndex(), MemoryIndex()
    large.add("llama", "pod-a", [name_of(node) for node in range(10_000)], None)
    assert 50 < (large.stats().memory_bytes - small.stats().memory_bytes) / 10_000 < 500
