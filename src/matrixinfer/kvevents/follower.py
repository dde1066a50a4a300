"""Follows the KV events of pods as they join, change and leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import structlog

from matrixinfer.config import Config
from matrixinfer.kvevents.subscriber import FeedSource, Subscriber
from matrixinfer.pods.registry import Pod
from matrixinfer.scheduler.plugins.kvcache_aware import KvCacheAware

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
        self._wanted = any(ref.name == KvCacheAware.name for ref in scorers) and listens
        self._warned: set[str] = set()
        self._following: dict[str, frozenset[str]] = {}  # pod -> names of its feeds
        self._endpoints: dict[str, frozenset[str]] = {}

    def __call__(self, pod: Pod) -> None:
        """Follow the pod where it publishes now, under the model that it serves now."""
        sources = {source.name: source for source in feed_sources(pod, self._models)} if self._listens else {}
        self._unfollow(self._following.get(pod.name, frozenset()) - sources.keys())
        for source in sources.values():
            self._subscriber.follow(source)
        self._following[pod.name] = frozenset(sources)
        self._on_followed()
        endpoints = frozenset(endpoint.name for endpoint in pod.endpoints)
        for name in self._endpoints.get(pod.name, frozenset()) - endpoints:
            self._on_gone(name)
        self._endpoints[pod.name] = endpoints
        if not sources and self._wanted and pod.kv_sources is not None and pod.name not in self._warned:
            self._warned.add(pod.name)
            reason = "its model is unknown" if pod.kv_sources else "it publishes no KV events"
            log.warning("kv_events_not_followed", pod=pod.name, reason=reason)

    def leave(self, pod: Pod) -> None:
        """Stop following a pod that has left, with all its endpoints."""
        self._unfollow(self._following.pop(pod.name, frozenset()))
        self._warned.discard(pod.name)
        for name in self._endpoints.pop(pod.name, frozenset()) | {endpoint.name for endpoint in pod.endpoints}:
            self._on_gone(name)

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
    for rank, source in enumerate(pod.kv_sources):
        yield FeedSource(
            pod=pod.name,
            rank=rank if len(pod.kv_sources) > 1 else None,
            model=model,
            endpoint=source.endpoint,
            replay_endpoint=source.replay_endpoint,
            topic=source.topic,
        )
