"""How far each endpoint's KV events are believed: a pure function of its feed and of what its answers have shown.

exact     every batch since the engine started, or was last empty, has been applied
partial   what is indexed is true, but more may be cached: joined late, history truncated, salts or adapters hidden
stale     what is indexed may be untrue: batches are missing or on their way, the engine is silent, or its answers
          contradict the index
none      the events do not say what is cached, or nobody follows them

          complete    partial    syncing    stale    untrusted, no feed
alive     exact       partial    stale      stale    none
silent    stale       stale      stale      stale    none
doubted   stale       stale      stale      stale    none
"""

from __future__ import annotations

from matrixinfer.kvevents.feed import FeedState, PodFeed
from matrixinfer.scheduler.framework import Trust

_BY_STATE: dict[FeedState, Trust] = {
    FeedState.COMPLETE: "exact",
    FeedState.PARTIAL: "partial",
    FeedState.SYNCING: "stale",
    FeedState.STALE: "stale",
    FeedState.UNTRUSTED: "none",
}


def trust(state: FeedState | None, *, silent: bool, doubted: bool) -> Trust:
    """Trust in a feed in `state` (None: no feed) that is `silent` to heartbeats, or `doubted` because of drift."""
    if state is None:
        return "none"
    believed = _BY_STATE[state]
    return "stale" if (silent or doubted) and believed != "none" else believed


def trust_in(feed: PodFeed | None, *, doubted: bool) -> Trust:
    """Trust in a feed as it is now."""
    if feed is None:
        return "none"
    return trust(feed.state, silent=feed.is_silent, doubted=doubted)
