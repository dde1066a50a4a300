"""Memory is given back by the garbage collector, too, which may run at any time."""

from __future__ import annotations

import gc
import threading

from matrixinfer.prompt.memory import Memory
from tests.waiting import DEADLINE_SECONDS


class _Collecting(Memory):
    """The garbage collector runs while the memory is locked."""

    def fits(self, held: int, more: int) -> bool:
        gc.collect()
        return super().fits(held, more)


def test_what_is_collected_while_memory_is_taken_is_given_back() -> None:
    memory = _Collecting(1000)

    def take() -> None:
        held = memory.hold()
        assert held.take(10)
        cycle: list[object] = [held]
        cycle.append(cycle)
        del held, cycle
        assert memory.hold().take(5)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    thread.join(DEADLINE_SECONDS)
    assert not thread.is_alive()
    assert memory.used == 0
