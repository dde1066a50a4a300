"""Whose KV events are followed, and under which name: by what pods tell of themselves, as they come, change and go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import structlog

from matrixinfer.config import Config
from matrixinfer.kvevents.subscriber import FeedSource, Subscriber
from matrixinfer.pods.registry import Pod
from matrixinfer.scheduler.plugins.kvcache_aware import KvCacheAware

log = structlog.get_logger(__name__)


class EventFollower:
    """Follows the KV events of pods by what they tell; call it with a pod whenever that may have changed.

    `on_gone` is called with the name of every endpoint that a pod does not have any more, `on_followed` whenever feeds may
    have come. With `listens` false others follow the events, and only what goes is told.
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
            reason = "its model is not known" if pod.kv_sources else "it publishes no KV events"
            log.warning("kv_events_not_followed", pod=pod.name, reason=reason)

    def leave(self, pod: Pod) -> None:
        """The pod is gone, with all its endpoints."""
        self._unfollow(self._following.pop(pod.name, frozenset()))
        self._warned.discard(pod.name)
        for name in self._endpoints.pop(pod.name, frozenset()) | {endpoint.name for endpoint in pod.endpoints}:
            self._on_gone(name)

    def _unfollow(self, names: frozenset[str]) -> None:
        for name in names:
            self._subscriber.unfollow(name)


def feed_sources(pod: Pod, models: Sequence[str]) -> Iterator[FeedSource]:
    """Where a pod publishes, one for each data-parallel rank; nothing when nowhere or not known.

    A pod that does not tell its model (it may want an API key) has the only one of `models`, those configured.
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
