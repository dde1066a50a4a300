"""Follows the KV events of many engines.

Per turn of the event loop live frames take at most `SLICE_SECONDS`, whatever their backlog and the number of engines,
and so do replayed ones; either may exceed it by one frame.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from types import TracebackType

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.index.base import BlockIndex
from matrixinfer.kvevents.connect import open_context
from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.subscription import FeedSource, Shared, Subscription
from matrixinfer.kvevents.tiers import index_names
from matrixinfer.traffic.history import RoutingHistory

__all__ = ["FeedSource", "Subscriber"]

_MAX_SOCKETS = 16_384
"""Three per engine."""


class Subscriber:
    """Keeps an index up to date with the engines that it follows.

    Use it as an async context manager; call `follow` and `unfollow` at any time within it. `feeds` is a dict for the
    feed of each publisher that is followed, by its name; only the subscriber changes it. `on_reconnected` is called with
    the pod of a publisher that was lost and is back, if the engine itself has said where it publishes: call `confirm`
    once it has said so again. `on_shortage` is called when this process cannot connect, whatever the publisher.
    """

    def __init__(
        self,
        *,
        index: BlockIndex,
        blocks: TokenBlockProcessor,
        history: RoutingHistory | None = None,
        feeds: dict[str, PodFeed] | None = None,
        on_reconnected: Callable[[str], None] = lambda _: None,
        on_shortage: Callable[[str, str], None] = lambda _place, _what: None,
    ) -> None:
        self._index = index
        self._history = history
        self._on_reconnected = on_reconnected
        self._on_shortage = on_shortage
        self._blocks = blocks
        self.feeds: dict[str, PodFeed] = {} if feeds is None else feeds
        self._followed: dict[str, tuple[Subscription, asyncio.Task[None]]] = {}
        self._group = asyncio.TaskGroup()
        self._shared: Shared | None = None

    async def __aenter__(self) -> Subscriber:
        self._shared = Shared(open_context(_MAX_SOCKETS), self._on_shortage)
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._followed):
            self.unfollow(name)
        # The group must not see the caller's error: it would wrap it in an exception group.
        await self._group.__aexit__(None, None, None)
        if self._shared is not None:
            self._shared.context.destroy(linger=0)
            self._shared = None

    def follow(self, source: FeedSource) -> PodFeed:
        """Follow a publisher, which need not be up yet. A name followed from another source so far changes to this one."""
        if self._shared is None:
            raise RuntimeError("the subscriber is not running")
        name = source.name
        if name in self._followed:
            if self._followed[name][0].source == source:
                return self.feeds[name]
            self.unfollow(name)
        ledger = Ledger(pod=name, model=source.model, blocks=self._blocks, index=self._index, history=self._history)
        feed = PodFeed(ledger, can_replay=source.replay_endpoint is not None)
        subscription = Subscription(self._shared, source, feed, self._on_reconnected)
        task = self._group.create_task(subscription.run(), name=f"kv-events {name}")
        self._followed[name] = subscription, task
        self.feeds[name] = feed
        return feed

    def resync(self, name: str, *, replay: bool) -> None:
        """The index has turned out wrong for a publisher: fetch its history again, or clear it. Returns at once."""
        if name in self._followed:
            self._followed[name][0].resync(replay=replay)

    def connections(self, names: Collection[str]) -> Mapping[str, int]:
        """How often each publisher's connection has changed, for `confirm`."""
        return {name: self._followed[name][0].connections for name in names if name in self._followed}

    def confirm(self, connections: Mapping[str, int]) -> None:
        """Engines have said where they publish, after these changes of the connections."""
        for name, count in connections.items():
            if name in self._followed:
                self._followed[name][0].confirm(count)

    def unfollow(self, name: str) -> None:
        """Stop following a publisher, and forget its blocks. Does nothing if it is not followed."""
        if name not in self._followed:
            return
        subscription, task = self._followed.pop(name)
        del self.feeds[name]
        subscription.closed = True
        task.cancel()
        subscription.feed.ledger.clear()  # requests in flight may still read it
        for index_name in index_names(name):
            self._index.forget(index_name)
