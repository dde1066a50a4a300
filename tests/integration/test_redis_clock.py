"""Tests the logical clock: with any clock and any order of writers, exactly the blocks of the current writer count."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable

import pytest

from matrixinfer.index.redis import match_script, read_scripts, scripts
from matrixinfer.index.redis.commands import Commands, Fenced, Lease
from matrixinfer.index.redis.outbox import Change
from matrixinfer.index.redis.reader import BlockReader
from matrixinfer.index.redis.store import Store
from tests.servers import Server

pytestmark = pytest.mark.server

RUNS, STEPS, BLOCKS = 200, 16, range(1, 5)
LEASE, MAX_AGE = 3.0, 1e6
META = {"block_size": "128", "hash_scheme": "prefix", "version": "1"}


class Clock:
    """Seconds that rarely advance between steps and sometimes go back."""

    def __init__(self, random: random.Random) -> None:
        self.now = 1_700_000_000
        self._random = random

    def __call__(self) -> float:
        return self.now

    def step(self) -> None:
        self.now += self._random.choice((0, 0, 0, 0, 0, 0, 1, 1, 2, -1, -5))


class Writers:
    """Two writers of one pod that act like `BlockWriter`, and the blocks of the current one."""

    def __init__(self, commands: Commands, clock: Clock, random: random.Random) -> None:
        self.held: set[int] = set()
        self._commands = commands
        self._clock = clock
        self._random = random
        self._leases: dict[str, Lease] = {}
        self._current = ""
        self._min_stamp = 0

    async def step(self) -> None:
        self._clock.step()
        act = self._random.choices(
            (self._add, self._remove, self._clear, self._take_over, self._late), weights=(6, 3, 2, 1, 1)
        )[0]
        if self._current:
            await act()
        else:
            await self._take_over()

    async def _add(self) -> None:
        blocks = self._some()
        self.held.update(blocks)
        await self._write("+", blocks)

    async def _remove(self) -> None:
        blocks = self._some()
        self.held.difference_update(blocks)
        await self._write("-", blocks)

    async def _clear(self) -> None:
        self.held.clear()
        await self._commands.set_epoch(self._leases[self._current], 0, now=self._clock())

    async def _take_over(self) -> None:
        """The other writer writes other blocks with stamps of a future epoch and then starts that epoch."""
        if self._current and self._random.random() < 0.5:
            await self._commands.release(self._leases[self._current])
        self._current = "b" if self._current == "a" else "a"
        while (lease := await self._acquire()) is None:
            self._clock.now += 1  # until the other writer's lease ends
        self._leases[self._current] = lease
        self._min_stamp = lease.next_epoch
        self.held = set(self._some())
        for block in self.held:
            self._clock.step()
            await self._write("+", [block])
        self._clock.step()
        await self._commands.set_epoch(lease, self._min_stamp, now=self._clock())

    async def _acquire(self) -> Lease | None:
        return await self._commands.acquire("pod-a", self._current, now=self._clock(), lease_seconds=LEASE)

    async def _late(self) -> None:
        """The writer that was replaced wakes up."""
        late = next((lease for name, lease in self._leases.items() if name != self._current), None)
        if late is None:
            return
        with pytest.raises(Fenced):
            await self._commands.write(late, [self._change("+", list(BLOCKS))], now=self._clock(), min_stamp=0)
        with pytest.raises(Fenced):
            await self._commands.write(late, [self._change("-", list(BLOCKS))], now=self._clock(), min_stamp=0)
        with pytest.raises(Fenced):
            await self._commands.set_epoch(late, 0, now=self._clock())

    async def _write(self, sign: str, blocks: list[int]) -> None:
        change = self._change(sign, blocks)
        await self._commands.write(self._leases[self._current], [change], now=self._clock(), min_stamp=self._min_stamp)

    def _change(self, sign: str, blocks: list[int]) -> Change:
        return Change("llama", "+" if sign == "+" else "-", blocks)

    def _some(self) -> list[int]:
        return self._random.sample(BLOCKS, self._random.randint(1, len(BLOCKS)))


async def errors_in(run: int, server: Server, store: Store, *, readers: Store | None = None) -> int:
    """How often a lookup of each block alone, or of the last one, differs from the blocks of the current writer."""
    server.flush()
    chance = random.Random(run)
    clock = Clock(chance)
    writers = Writers(Commands(store, META), clock, chance)
    asked = BlockReader(readers or store, max_age=MAX_AGE, clock=clock)
    errors = 0
    for _ in range(STEPS):
        await writers.step()
        answers = await asyncio.gather(*(asked.match("llama", [block]) for block in BLOCKS))
        found = {block for block, answer in zip(BLOCKS, answers, strict=True) if answer}
        last = (await asked.last("llama", ["pod-a"], BLOCKS)).get("pod-a")
        expected = max((place for place, block in enumerate(BLOCKS) if block in writers.held), default=None)
        errors += (found, last) != (writers.held, expected)
    return errors


@pytest.fixture
async def store(valkey: Server) -> AsyncIterator[Store]:
    async with Store(valkey.config()) as store:
        yield store


async def test_two_hundred_histories_have_no_error(valkey: Server, store: Store) -> None:
    assert sum([await errors_in(run, valkey, store) for run in range(RUNS)]) == 0


async def test_histories_have_no_error_with_pipelines(valkey: Server, store: Store) -> None:
    async with Store(valkey.config(scripts=False)) as readers:
        assert sum([await errors_in(run, valkey, store, readers=readers) for run in range(RUNS // 10)]) == 0


def clears_at_now(source: str) -> str:
    """Use the current second as the epoch, so that earlier entries of this second still count."""
    return mutated(source, "new = math.max(math.floor(tonumber(ARGV[4])), epoch, last) + 1", "new = tonumber(ARGV[4])")


def clears_after_now(source: str) -> str:
    """Use the next second as the epoch, so that entries written after the clear in this second do not count."""
    return mutated(
        source, "new = math.max(math.floor(tonumber(ARGV[4])), epoch, last) + 1", "new = tonumber(ARGV[4]) + 1"
    )


def stamps_with_now(source: str) -> str:
    """Use the clock alone for stamps."""
    return mutated(source, "math.max(math.floor(tonumber(ARGV[3])), tonumber(ARGV[4]), epoch)", "tonumber(ARGV[3])")


def counts_above(source: str) -> str:
    """Count only entries with a stamp above the epoch."""
    return mutated(source, "if at >= floor and", "if at > floor and")


def finds_above(source: str) -> str:
    """Likewise for the last block."""
    return mutated(source, "if at >= floors[name] and", "if at > floors[name] and")


def mutated(source: str, old: str, new: str) -> str:
    assert old in source
    return source.replace(old, new)


@pytest.mark.parametrize(
    ("script", "mutate"),
    [
        pytest.param("EPOCH", clears_at_now, id="`>=` on seconds"),
        pytest.param("MATCH", counts_above, id="`>` on seconds"),
        pytest.param("LAST", finds_above, id="`>` on seconds for the last block"),
        pytest.param("EPOCH", clears_after_now, id="a second later"),
        pytest.param("WRITE", stamps_with_now, id="stamps of the clock alone"),
    ],
)
async def test_a_plain_comparison_of_seconds_would_err(
    valkey: Server,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    mutate: Callable[[str], str],
) -> None:
    module = {"MATCH": match_script, "LAST": read_scripts}.get(script, scripts)
    monkeypatch.setattr(module, script, mutate(getattr(module, script)))
    assert sum([await errors_in(run, valkey, store) for run in range(5)]) > 0
