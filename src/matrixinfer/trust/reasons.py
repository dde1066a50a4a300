"""Why an endpoint's events are not believed exactly, in words. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from matrixinfer.kvevents.feed import FeedState, PodFeed

UNFOLLOWED = "nobody follows its events, so that what it has cached is unknown; see `matrixinfer doctor`"
NOT_FOLLOWED = (UNFOLLOWED,)
HISTORY = (
    "events from before the first one that was read are missing, so hits may be longer than predicted; "
    "enable the engine's replay endpoint, or reset its cache"
)
UNTAGGED = "its events omit {}, so prompts that use them look like plain ones; upgrade the engine"
SYNCING = "its past events are being fetched, so what is indexed may be untrue until they are all here"
LOST = "the connection to its publisher is lost, so what is indexed may be untrue until it is back"
SILENT = "its publisher no longer answers, so what is indexed may be untrue until it does"
DOUBTED = "its answers contradict the index, so what is indexed may be untrue; it is being indexed again"
WARMING = "its blocks come from Redis since the start, and may be untrue until the engine's own events say more"
UNVOUCHED = "its writer reports nothing about the events that it reads, so hits may be longer or shorter than predicted"
WRITER_GONE = "the writer that follows its events has stopped, so what is indexed may be untrue until one runs again"
OTHER_SCHEME = "its blocks in Redis are made differently, so that none ever matches; see `matrixinfer doctor`"


def limits_of(feed: PodFeed | None, *, doubted: bool = False) -> Sequence[str]:
    """What the events of a feed cannot tell, and why they are not believed now. Empty where trust is exact."""
    if feed is None:
        return NOT_FOLLOWED
    if feed.untrusted is not None:
        return (feed.untrusted, *feed.limits)
    now = [
        words
        for words, holds in (
            (DOUBTED, doubted),
            (SILENT, feed.is_silent),
            (SYNCING, feed.state is FeedState.SYNCING),
            (LOST, feed.is_disconnected),
        )
        if holds
    ]
    return (*now, *feed.limits, *_omissions(feed), *((HISTORY,) if feed.lacks_history else ()))


def _omissions(feed: PodFeed) -> Sequence[str]:
    hidden = [
        name for name, hides in (("salts", feed.ledger.hides_salts), ("adapters", feed.ledger.hides_adapters)) if hides
    ]
    return (UNTAGGED.format(" and ".join(hidden)),) if hidden else ()
