"""Sets of pods as integers, one bit per pod, so that a million blocks can each have one."""

from __future__ import annotations

_NAMED_KEPT = 4_096  # sets with a cached list of names: most lookups see the same few sets
_SHARED_KEPT = 65_536  # distinct sets with a shared object; beyond this, sharing starts again


class PodSets:
    """Gives pods their bits.

    The bit of a pod that goes is dead: it may still be set in blocks, and counts for nothing. Once it has been cleared
    there, it is used again.
    """

    def __init__(self) -> None:
        self.live = 0
        """The set of all pods."""
        self._bit_of: dict[str, int] = {}
        self._pod_of: dict[int, str] = {}
        self._names_of: dict[int, list[str]] = {}  # emptied when pods come or go
        self._shared: dict[int, int] = {}
        self._dead: list[int] = []
        self._free: list[int] = []
        self._next = 1

    def __len__(self) -> int:
        return len(self._bit_of)

    @property
    def has_dead(self) -> bool:
        """Whether bits of pods that have gone may still be set."""
        return bool(self._dead)

    def bit(self, pod: str) -> int:
        """The set of this pod alone; 0 for an unknown pod."""
        return self._bit_of.get(pod, 0)

    def add(self, pod: str) -> int:
        """Give a new pod its bit, and return it."""
        if self._free:
            bit = self._free.pop()
        else:
            bit = self._next
            self._next <<= 1
        self._bit_of[pod] = bit
        self._pod_of[bit] = pod
        self._names_of.clear()
        self.live |= bit
        return bit

    def remove(self, pod: str) -> bool:
        """A pod goes. Returns whether it was known."""
        bit = self._bit_of.pop(pod, None)
        if bit is None:
            return False
        del self._pod_of[bit]
        self._names_of.clear()
        self.live &= ~bit
        self._dead.append(bit)
        return True

    def take_dead(self) -> list[int]:
        """The dead bits, which the caller clears in all blocks and then hands to `reuse`."""
        dead, self._dead = self._dead, []
        return dead

    def reuse(self, bits: list[int]) -> None:
        """These bits are set nowhere any more."""
        self._free += bits

    def start_over(self) -> None:
        """No bit is set anywhere, and there is no pod."""
        self._shared.clear()
        self._free.clear()
        self._dead.clear()
        self._next = 1

    def share(self, bits: int) -> int:
        """An equal set, which other blocks have as well."""
        if len(self._shared) >= _SHARED_KEPT:
            self._shared.clear()
        return self._shared.setdefault(bits, bits)

    def names(self, bits: int) -> list[str]:
        """The pods of a set, without those that have gone."""
        names = self._names_of.get(bits)
        if names is None:
            if len(self._names_of) >= _NAMED_KEPT:
                self._names_of.clear()
            names = self._names_of[bits] = [pod for bit, pod in self._pod_of.items() if bits & bit]
        return names

    @property
    def memory_bytes(self) -> int:
        """Memory of the shared sets."""
        return self._shared.__sizeof__()
