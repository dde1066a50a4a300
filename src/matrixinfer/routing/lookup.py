"""How many blocks of a prompt each endpoint holds, according to the index."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from matrixinfer.blocks import BlockChain
from matrixinfer.index.base import BlockIndex
from matrixinfer.pods.registry import Pod, PodRegistry
from matrixinfer.routing.holdings import Match, Matches, match_at, searches, straddled
from matrixinfer.trust.cache_views import Caches

__all__ = ["Lookup", "Match", "Matches"]


class Lookup:
    """Asks the index for a prompt's blocks and, where engine blocks straddle token blocks, for the tail behind them."""

    def __init__(self, registry: PodRegistry, index: BlockIndex, caches: Caches) -> None:
        self._registry = registry
        self._index = index
        self._asked: Sequence[Pod] = ()
        self._publishers: Sequence[str] | None = None
        self.caches = caches
        """What is known of every endpoint's cache."""

    async def match(self, model: str, requested: str, pods: Sequence[Pod], chain: BlockChain) -> Matches:
        """Match a prompt's `chain` at the endpoints of `pods`. Raises `IndexUnavailable`.

        Pods may name one model differently: each is looked up under its own name of the model that the client
        `requested`.
        """
        publishers = self._of_one_model(pods)
        if publishers is not None:
            found = await self._index.match(model, chain)
            return Matches(
                blocks=found,
                tails=await self._tails(model, chain, found) if found else found,
                ends=await self._ends(model, publishers, chain, found),
            )
        matches: dict[str, int] = {}
        tails: dict[str, int] = {}
        ends: dict[str, tuple[int, int]] = {}
        names = {pod.name: pod.index_name(self._registry.name_at(pod.name, requested)) or model for pod in pods}
        for name in set(names.values()):
            own = {each.name for pod in pods if names[pod.name] == name for each in pod.endpoints}
            counts = await self._index.match(name, chain)
            listed = own | {pod.name for pod in pods if names[pod.name] == name}  # not every writer tells ranks apart
            found = {publisher: count for publisher, count in counts.items() if publisher in listed}
            matches.update(found)
            tails.update(await self._tails(name, chain, found))
            ends.update(await self._ends(name, own, chain, found))
        return Matches(blocks=matches, tails=tails, ends=ends)

    def _of_one_model(self, pods: Sequence[Pod]) -> Sequence[str] | None:
        """The endpoints of `pods`; None if these name their models differently. The registry gives the same pods again."""
        if pods is not self._asked:
            is_one = len({pod.base_model for pod in pods}) == 1
            self._publishers = [each.name for pod in pods for each in pod.endpoints] if is_one else None
            self._asked = pods
        return self._publishers

    async def _ends(
        self, model: str, publishers: Collection[str], chain: BlockChain, matches: Mapping[str, int]
    ) -> Mapping[str, tuple[int, int]]:
        """Where not all that is held is reused: how much is, in blocks and tokens beyond them."""
        found: dict[str, tuple[int, int]] = {}
        for names, asking in searches(publishers, chain, matches, self.caches):
            try:
                question = next(asking)
                while True:
                    question = asking.send(await self._index.last(model, *question))
            except StopIteration as done:
                tokens: Mapping[str, int] = done.value
                found.update((names[end], divmod(length, chain.block_size)) for end, length in tokens.items())
        return found

    async def _tails(self, model: str, chain: BlockChain, matches: Mapping[str, int]) -> Mapping[str, int]:
        """Where engine blocks straddle token blocks: how many tokens behind each match its last engine block holds."""
        tails: dict[str, int] = {}
        for (tokens, block), names in straddled(chain, matches, self.caches).items():
            holders = await self._index.match(model, [block])
            tails.update((name, tokens) for name in names if name in holders)
        return tails

    def match_at(self, endpoint: str, matches: Matches | None) -> Match:
        """The match at one endpoint, by what is known about its cache now."""
        return match_at(endpoint, self.caches.of(endpoint), matches)
