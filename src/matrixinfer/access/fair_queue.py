"""Which request is next: deficit round robin between tenants, by tokens. Pure.

Tenants with a higher priority come first. Among tenants of one priority, each request that is served puts its tenant into
debt by the request's tokens, and every round pays off debts in proportion to the tenants' weights. A waiting tenant without
debt is next. Rounds pass until there is one, whatever requests cost. Debts outlast waiting, so a tenant gains nothing by
waiting with one request at a time. A tenant that uses less than its share saves a few requests' worth of it, so that its
bursts do not wait behind tenants that flood.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")
BURST = 4.0
"""How many of its requests a tenant can save for while it does not wait."""


class Standing(NamedTuple):
    """How a tenant is treated."""

    weight: float = 1.0
    priority: int = 0


@dataclass(slots=True, eq=False)
class Entry(Generic[Item]):
    """A request that waits."""

    tenant: str
    cost: float
    """Tokens, at least 1."""
    item: Item


@dataclass(slots=True)
class _Line(Generic[Item]):
    """The requests of one tenant, in the order in which they came."""

    standing: Standing
    entries: deque[Entry[Item]] = field(default_factory=deque)
    cost: float = 0.0
    """Of all its entries."""
    debt: float = 0.0
    """Tokens that it was served and that rounds have not paid off; negative if it has saved some."""
    typical: float = 0.0
    """Tokens of its last request."""

    @property
    def saved_most(self) -> float:
        """The most that it can save."""
        return BURST * self.typical

    @property
    def load(self) -> float:
        """How much waits, for its weight."""
        return self.cost / self.standing.weight

    @property
    def rounds(self) -> float:
        """How long it takes until it has no debt."""
        return self.debt / self.standing.weight


class FairQueue(Generic[Item]):
    """Up to `size` requests. `standing` says how a tenant is treated."""

    def __init__(self, size: int, standing: Callable[[str], Standing]) -> None:
        self._size = size
        self._standing = standing
        self._lines: OrderedDict[str, _Line[Item]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def reconfigure(self, size: int, standing: Callable[[str], Standing]) -> None:
        """Hold so many and treat tenants like this from now on. Requests that are more than that keep their places."""
        self._size = size
        self._standing = standing
        for tenant, line in self._lines.items():
            line.standing = standing(tenant)

    def push(self, tenant: str, cost: float, item: Item) -> tuple[Entry[Item], Entry[Item] | None]:
        """Add a request. Returns its entry, and the entry that it displaced, if any: possibly its own."""
        line = self._lines.get(tenant)
        if line is None:
            # It has not used its share as far as is known, so it has saved as much as it can.
            line = self._lines[tenant] = _Line(self._standing(tenant), debt=-BURST * max(1.0, cost))
        entry = Entry(tenant, max(1.0, cost), item)
        line.typical = entry.cost
        line.entries.append(entry)
        line.cost += entry.cost
        self._count += 1
        if self._count <= self._size:
            return entry, None
        waiting = (each for each in self._lines.values() if each.entries)
        largest = max(waiting, key=lambda each: (-each.standing.priority, each.load))
        displaced = largest.entries[-1]
        self.drop(displaced)
        return entry, displaced

    def pop(self) -> Entry[Item] | None:
        """Remove and return the next request; None if none waits."""
        waiting = [line for line in self._lines.values() if line.entries]
        if not waiting:
            return None
        first = max(line.standing.priority for line in waiting)
        chosen = min((line for line in waiting if line.standing.priority == first), key=lambda line: line.rounds)
        entry = chosen.entries[0]
        self._pay(max(0.0, chosen.rounds), first)
        chosen.debt += entry.cost
        self._lines.move_to_end(entry.tenant)  # among equals the others come first
        self._remove(chosen, entry)
        return entry

    def drop(self, entry: Entry[Item]) -> None:
        """A request waits no longer, without having had its turn. No effect if it does not wait."""
        line = self._lines.get(entry.tenant)
        if line is not None and entry in line.entries:
            self._remove(line, entry)

    def settle(self, tenant: str, more: float) -> None:
        """A request that had its turn has cost `more` than was said; less if negative. Only counts while others wait."""
        line = self._lines.get(tenant)
        if line is not None:
            line.debt = max(line.debt + more, min(line.debt, -line.saved_most))

    def tokens_ahead(self, tenant: str) -> float:
        """How many tokens are served before a new request of a tenant, if no other request comes."""
        own = self._lines.get(tenant)
        standing = self._standing(tenant)
        load = 0.0 if own is None else max(0.0, own.load + own.rounds)
        ahead = 0.0
        for line in self._lines.values():
            if line.standing.priority > standing.priority:
                ahead += line.cost
            elif line.standing.priority == standing.priority:
                ahead += min(line.load, max(0.0, load - line.rounds)) * line.standing.weight
        return ahead

    def _pay(self, rounds: float, priority: int) -> None:
        """Pay off what so many rounds pay to tenants of a priority.

        A tenant that does not wait and has saved all that it can is forgotten.
        """
        for tenant, line in list(self._lines.items()):
            if line.standing.priority != priority:
                continue
            line.debt -= rounds * line.standing.weight
            if not line.entries and line.debt <= -line.saved_most:
                del self._lines[tenant]

    def _remove(self, line: _Line[Item], entry: Entry[Item]) -> None:
        if entry is line.entries[0]:
            line.entries.popleft()
        else:
            line.entries.remove(entry)
        line.cost -= entry.cost
        self._count -= 1
        if not self._count:
            self._lines.clear()  # no tenant waits for another any more
