"""Collects the prompts sent by this gateway and builds the messages that publish them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

from matrixinfer.traffic.load import Charge
from matrixinfer.traffic.peers.message import MAX_PROMPTS, Load, Prompt, encode

REPEAT_SECONDS = 1.0
"""A prompt that is still being computed is published again after this long, because its blocks expire at peers."""
AT_LEAST_EVERY_SECONDS = 1.0
"""Longest time between two messages, even if nothing has changed."""
LEAST_PAUSE_SECONDS, MOST_PAUSE_SECONDS = 0.02, 0.1
_BYTES_PER_SECOND = 1_000_000
_HEARD_PER_SECOND = 500
"""Messages of all peers that a gateway should have to read, and bytes that it should publish."""


def pause_after(message: bytes, peers: int) -> float:
    """Seconds from one message to the next. What peers do not know yet is decided without, so it is short."""
    return min(
        MOST_PAUSE_SECONDS, max(LEAST_PAUSE_SECONDS, len(message) / _BYTES_PER_SECOND, peers / _HEARD_PER_SECOND)
    )


class Announcements:
    """Collects up to `MAX_PROMPTS` different prompts. Further ones are dropped and counted."""

    def __init__(self, gateway: str) -> None:
        self.gateway = gateway
        self.dropped = 0
        """Prompts that were not published, or only in part."""
        self._entries: dict[Hashable, _Entry] = {}
        self._load: Mapping[str, Load] = {}
        self._ejected: list[str] = []
        self._published_at = float("-inf")

    def add_in_flight(self, endpoint: str, model: str, hashes: Sequence[int], start: int, charge: Charge) -> None:
        """Add a prompt that was just sent to an endpoint; the blocks from `start` on are pending there."""
        self._add(Prompt(endpoint, model, False, hashes, start), lambda: charge.awaits_first_byte)

    def add_computed(self, endpoint: str, model: str, hashes: Sequence[int], by_bytes: bool = False) -> None:
        """Add a prompt that an endpoint has computed; its events may not report all of it."""
        self._add(Prompt(endpoint, model, True, hashes, by_bytes=by_bytes), lambda: False)

    def message(self, load: Mapping[str, Load], now: float, ejected: Sequence[str] = ()) -> bytes | None:
        """The message to publish now, or None if there is nothing new. Pass all of the gateway's `load` and ejections."""
        ended = [
            key for key, entry in self._entries.items() if entry.published_at is not None and not entry.is_in_flight()
        ]
        for key in ended:
            del self._entries[key]
        due = [entry for entry in self._entries.values() if entry.is_due(now)]
        if (
            not due
            and load == self._load
            and list(ejected) == self._ejected
            and now < self._published_at + AT_LEAST_EVERY_SECONDS
        ):
            return None
        for entry in due:
            entry.published_at = now
        message, left_out = encode(self.gateway, load, [entry.prompt for entry in due], ejected)
        self.dropped += left_out
        self._load, self._ejected, self._published_at = dict(load), list(ejected), now
        return message

    def discard(self) -> None:
        """Drop all prompts after the connection was lost: the last message may not have arrived, and the rest is late."""
        self.dropped += len(self._entries)
        self._entries.clear()
        self._load, self._published_at = {}, float("-inf")

    def _add(self, prompt: Prompt, is_in_flight: Callable[[], bool]) -> None:
        count = len(prompt.hashes)
        if prompt.start >= count:
            return
        # Prompts with the same key are equal. (With the hash scheme `block` they only nearly always are.)
        key = (*prompt[:3], count, prompt.hashes[-1])
        if key in self._entries:
            self._entries[key].is_in_flight = is_in_flight
            return
        if len(self._entries) >= MAX_PROMPTS:
            published = next((key for key, entry in self._entries.items() if entry.published_at is not None), None)
            if published is None:
                self.dropped += 1
                return
            del self._entries[published]
        self._entries[key] = _Entry(prompt, is_in_flight)


class _Entry:
    __slots__ = ("is_in_flight", "prompt", "published_at")

    def __init__(self, prompt: Prompt, is_in_flight: Callable[[], bool]) -> None:
        self.prompt = prompt
        self.is_in_flight = is_in_flight
        self.published_at: float | None = None

    def is_due(self, now: float) -> bool:
        return self.published_at is None or now >= self.published_at + REPEAT_SECONDS
