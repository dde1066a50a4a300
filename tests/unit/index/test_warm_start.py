from matrixinfer.index.memory import MemoryIndex
from matrixinfer.index.warm_start import WarmIndex

CHAIN = [11, 12, 13, 14]


async def test_blocks_from_elsewhere_count_until_a_pod_has_own_events() -> None:
    own_events: set[str] = set()
    index = WarmIndex(MemoryIndex(), max_blocks=100, has_own_events=own_events.__contains__)
    for block in reversed(CHAIN):  # a scan is unordered
        index.warm("m", "pod-a", [block])
    index.warm("m", "pod-b", CHAIN[:2])
    assert await index.match("m", CHAIN) == {"pod-a": 4, "pod-b": 2}
    assert index.is_warming("pod-a")
    index.add("m", "pod-b", CHAIN[:3], None)
    assert await index.match("m", CHAIN) == {"pod-a": 4, "pod-b": 3}
    own_events.add("pod-a")
    assert await index.match("m", CHAIN) == {"pod-b": 3}
    assert not index.is_warming("pod-a")
    index.warm("m", "pod-a", CHAIN)  # a late page of the scan
    assert await index.match("m", CHAIN) == {"pod-b": 3}


async def test_removed_blocks_no_longer_count_and_a_clear_keeps_blocks_from_elsewhere() -> None:
    index = WarmIndex(MemoryIndex(), max_blocks=100, has_own_events=lambda _: False)
    index.warm("m", "pod-a", CHAIN)
    index.remove("m", "pod-a", [CHAIN[3]])
    index.clear("pod-a")
    assert await index.match("m", CHAIN) == {"pod-a": 3}
    index.forget("pod-a")
    assert await index.match("m", CHAIN) == {}
    assert not index.is_warming("pod-a")


async def test_memory_is_bounded() -> None:
    index = WarmIndex(MemoryIndex(), max_blocks=10, has_own_events=lambda _: False)
    for block in range(1000):
        index.warm("m", "pod-a", [block])
    assert index.stats().evicted == 990


async def test_ends_from_elsewhere_count_until_their_pod_has_own_events() -> None:
    own_events: set[str] = set()
    index = WarmIndex(MemoryIndex(), max_blocks=100, has_own_events=own_events.__contains__)
    index.warm("m", "pod-a", CHAIN)
    index.warm("m", "pod-a~ends", [CHAIN[2], CHAIN[0]])
    index.add("m", "pod-a~ends", [CHAIN[1]], None)
    names = ("pod-a", "pod-a~ends", "pod-b~ends")
    assert await index.match("m", CHAIN) == {"pod-a": 4}
    assert await index.last("m", names, CHAIN) == {"pod-a": 3, "pod-a~ends": 2}
    index.remove("m", "pod-a~ends", [CHAIN[2]])
    assert await index.last("m", names, CHAIN) == {"pod-a": 3, "pod-a~ends": 1}
    own_events.add("pod-a")
    assert await index.last("m", names, CHAIN) == {"pod-a~ends": 1}
    index.warm("m", "pod-a~ends", CHAIN)  # a late page of the scan
    assert await index.last("m", names, CHAIN) == {"pod-a~ends": 1}
