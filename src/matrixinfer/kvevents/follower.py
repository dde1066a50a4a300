"""Follows the KV events of pods as they join, change and leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import structlog

from matrixinfer.config import Config
from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.kvevents.limits import HIDDEN_COMPONENTS, fewer_ranks
from matrixinfer.kvevents.subscriber import FeedSource, Subscriber
from matrixinfer.pods.registry import Pod
from matrixinfer.scheduler.plugins.expected_ttft import ExpectedTtft
from matrixinfer.scheduler.plugins.kvcache_aware import KvCacheAware

_READ_EVENTS = frozenset((ExpectedTtft.name, KvCacheAware.name))
"""The scorers that can do little without events."""

log = structlog.get_logger(__name__)


class EventFollower:
    """Keeps a subscriber on the KV events of every pod. Call it with a pod whenever the pod's facts may have changed.

    It calls `on_gone` with the name of each endpoint that a pod no longer has, and `on_followed` whenever there may be
    new feeds. With `listens` false another process follows the events, and only `on_gone` is called.
    """

    def __init__(
        self,
        subscriber: Subscriber,
        config: Config,
        *,
        on_gone: Callable[[str], None] = lambda _: None,
        on_followed: Callable[[], None] = lambda: None,
        listens: bool = True,
    ) -> None:
        self._subscriber = subscriber
        self._on_gone = on_gone
        self._on_followed = on_followed
        self._listens = listens
        self._models = [model.name for model in config.models]
        scorers = config.scheduler.plugins.score.enabled
        self._wanted = any(ref.name in _READ_EVENTS for ref in scorers) and listens
        self._warned: set[str] = set()
        self._following: dict[str, frozenset[str]] = {}  # pod -> names of its feeds
        self._endpoints: dict[str, frozenset[str]] = {}
        self._asked: dict[str, Mapping[str, int]] = {}
        self._short: dict[str, str] = {}  # pod -> words

    def __call__(self, pod: Pod) -> None:
        """Follow the pod where it publishes now, under the model that it serves now."""
        sources = {source.name: source for source in feed_sources(pod, self._models)} if self._listens else {}
        self._unfollow(self._following.get(pod.name, frozenset()) - sources.keys())
        for source in sources.values():
            self._describe(self._subscriber.follow(source), source, pod)
        self._following[pod.name] = frozenset(sources)
        self._on_followed()
        endpoints = frozenset(endpoint.name for endpoint in pod.endpoints)
        for name in self._endpoints.get(pod.name, frozenset()) - endpoints:
            self._on_gone(name)
        self._endpoints[pod.name] = endpoints
        self._warn_of_ranks(pod, len(sources))
        if not sources and self._wanted and pod.kv_sources is not None and pod.name not in self._warned:
            self._warned.add(pod.name)
            reason = "its model is unknown" if pod.kv_sources else "it publishes no KV events"
            log.warning("kv_events_not_followed", pod=pod.name, reason=reason)

    def asking(self, pod: Pod) -> None:
        """The pod is about to be asked where it publishes."""
        self._asked[pod.name] = self._subscriber.connections(self._following.get(pod.name, frozenset()))

    def answered(self, pod: Pod) -> None:
        """The pod has said where it publishes; if it was something new, this object was called with it, too."""
        self._subscriber.confirm(self._asked.pop(pod.name, {}))

    def leave(self, pod: Pod) -> None:
        """Stop following a pod that has left, with all its endpoints."""
        self._unfollow(self._following.pop(pod.name, frozenset()))
        self._warned.discard(pod.name)
        self._short.pop(pod.name, None)
        self._asked.pop(pod.name, None)
        for name in self._endpoints.pop(pod.name, frozenset()) | {endpoint.name for endpoint in pod.endpoints}:
            self._on_gone(name)

    def _describe(self, feed: PodFeed, source: FeedSource, pod: Pod) -> None:
        """Tell the feed what the pod says about its ranks."""
        feed.listed_ranks = source.batch_ranks
        words = _missing_ranks(pod)
        feed.remarks.reset()
        if words is not None:
            feed.remarks.note(words)
        if pod.facts is not None and pod.facts.hides_components:
            feed.remarks.note(HIDDEN_COMPONENTS)

    def _warn_of_ranks(self, pod: Pod, followed: int) -> None:
        words = _missing_ranks(pod) if followed else None
        if words is None:
            self._short.pop(pod.name, None)
        elif self._short.get(pod.name) != words:
            self._short[pod.name] = words
            log.warning("kv_events_ranks_missing", pod=pod.name, reason=words)

    def _unfollow(self, names: frozenset[str]) -> None:
        for name in names:
            self._subscriber.unfollow(name)


def feed_sources(pod: Pod, models: Sequence[str]) -> Iterator[FeedSource]:
    """Where a pod publishes, one source per data-parallel rank; empty if it publishes nowhere or that is unknown.

    `models` are the configured ones. If there is only one, a pod that does not say which model it serves (it may require
    an API key) is taken to serve that one.
    """
    model = pod.base_model or (models[0] if len(models) == 1 else None)
    if not pod.kv_sources or model is None:
        return
    is_reported = pod.config.kv_events == "discover"
    for source in pod.kv_sources:
        yield FeedSource(
            pod=pod.name,
            rank=source.rank if len(pod.kv_sources) > 1 else None,
            batch_ranks=frozenset(() if source.rank is None else (source.rank, pod.position(source.rank))),
            model=model,
            root=None if pod.served is None else pod.served.root,
            endpoint=source.endpoint,
            replay_endpoint=source.replay_endpoint,
            topic=source.topic,
            is_reported=is_reported,
        )


def _missing_ranks(pod: Pod) -> str | None:
    """Words for ranks that do not publish; None if all do."""
    followed = len(pod.kv_sources or ())
    return fewer_ranks(pod.rank_count, followed) if 0 < followed < pod.rank_count else None
