from matrixinfer.index.memory import MemoryIndex
from matrixinfer.index.warm_start import WarmIndex

CHAIN = [11, 12, 13, 14]


async def test_what_is_known_from_elsewhere_counts_until_a_pod_has_told() -> None:
    told: set[str] = set()
    index = WarmIndex(MemoryIndex(), max_blocks=100, is_told=told.__contains__)
    for block in reversed(CHAIN):  # a scan has no order
        index.warm("m", "pod-a", [block])
    index.warm("m", "pod-b", CHAIN[:2])
    assert await index.match("m", CHAIN) == {"pod-a": 4, "pod-b": 2}
    assert index.is_warming("pod-a")
    index.add("m", "pod-b", CHAIN[:3], None)
    assert await index.match("m", CHAIN) == {"pod-a": 4, "pod-b": 3}
    told.add("pod-a")
    assert await index.match("m", CHAIN) == {"pod-b": 3}
    assert not index.is_warming("pod-a")
    index.warm("m", "pod-a", CHAIN)  # a page of the scan that came late
    assert await index.match("m", CHAIN) == {"pod-b": 3}


async def test_what_events_remove_counts_no_more_and_a_new_beginning_of_a_feed_costs_nothing() -> None:
    index = WarmIndex(MemoryIndex(), max_blocks=100, is_told=lambda _: False)
    index.warm("m", "pod-a", CHAIN)
    index.remove("m", "pod-a", [CHAIN[3]])
    index.clear("pod-a")
    assert await index.match("m", CHAIN) == {"pod-a": 3}
    index.forget("pod-a")
    assert await index.match("m", CHAIN) == {}
    assert not index.is_warming("pod-a")


async def test_memory_is_bounded() -> None:
    index = WarmIndex(MemoryIndex(), max_blocks=10, is_told=lambda _: False)
    for block in range(1000):
        index.warm("m", "pod-a", [block])
    assert index.stats().evicted == 990
