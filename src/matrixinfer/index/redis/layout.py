"""The keys in Redis, and the rules for which entries count. Pure.

    matrix:kv:block:{model}@{hash}    hash: pod -> the writer's stamp in Unix seconds, as decimal text
    matrix:kv:meta:{model}            hash: block_size, hash_scheme, version

`pod` may also be a name of reusable ends, `pod~ends`: its entries mark places, and are not blocks that the pod holds.
MatrixInfer and kthena also use the first key. The others belong to this gateway. The braces are a hash tag of Redis
Cluster: it keeps the small tables in one slot, so that one script can change them together:

    {matrix:kv}:epochs     pod -> epoch: entries with a smaller stamp do not count
    {matrix:kv}:stamps     pod -> the last stamp of its writer
    {matrix:kv}:tokens     pod -> fencing token of its writer
    {matrix:kv}:writers    pod -> id of its writer
    {matrix:kv}:leases     pod -> Unix seconds until which the writer is considered alive
    {matrix:kv}:states     pod -> JSON: the writer's trust in the pod's events, and what it knows about its blocks

**Stamps form a logical clock, because they have a resolution of one second.** A writer stamps `max(now, epoch)`. To
clear a pod, its epoch becomes `max(now, epoch, last stamp) + 1`. So earlier entries do not count and later ones do, even
within the same second or if the clock goes back. An entry counts if its stamp is at least its pod's epoch and, unless
the pod has a living writer, at most `max_age` seconds old and younger than the engine, if it is known when that started.

**Other writers** may stamp in other forms: a fraction is cut off, and 13 to 19 digits are milli-, micro- or nanoseconds.
Any other text does not say how old the entry is. Such an entry counts unless the pod has an epoch or a lease, so that a
writer of this project writes for it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from matrixinfer.config import CLUSTER_SUFFIX
from matrixinfer.config.endpoint_names import ENDS_SUFFIX

BLOCKS = "matrix:kv:block:"
META = "matrix:kv:meta:"
EPOCHS = "{matrix:kv}:epochs"
STAMPS = "{matrix:kv}:stamps"
TOKENS = "{matrix:kv}:tokens"
WRITERS = "{matrix:kv}:writers"
LEASES = "{matrix:kv}:leases"
STATES = "{matrix:kv}:states"

SUFFIX = CLUSTER_SUFFIX
"""A suffix that some writers add to a pod's name."""

UNDATED = 2**53
"""Stands for a stamp that cannot be read. It is above all stamps that can."""
_STAMP = re.compile(rb"0*([0-9]{1,19})(?:\.[0-9]*)?")
_UNITS = ((19, 9), (16, 6), (13, 3))
"""From how many digits on a stamp has more digits than seconds have, and how many more."""

Entries = Mapping[bytes, bytes]
"""One block as stored in Redis: pod names to stamps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Floors:
    """Which entries count, by their stamps."""

    by_pod: Mapping[str, int]
    """The smallest stamp that counts, of every pod for which it differs from `default`."""
    default: int
    ruled: Collection[str] = ()
    """Pods for which writers of this project have written: their entries count only with a stamp that can be read."""

    def counts(self, pod: str, at: int) -> bool:
        """Whether an entry of a pod counts, by its stamp (`stamp_of`)."""
        return at >= self.by_pod.get(pod, self.default) and (at != UNDATED or pod not in self.ruled)


def prefix_of(model: str) -> str:
    """The prefix of the keys of a model's blocks; the hash follows in decimal."""
    return f"{BLOCKS}{model}@"


def block_of(key: str) -> tuple[str, int] | None:
    """The model and the hash in a block's key; None for other keys."""
    model, separator, block = key.removeprefix(BLOCKS).rpartition("@")
    if not key.startswith(BLOCKS) or not separator or not block.isdecimal():
        return None
    return model, int(block)


def meta_key(model: str) -> str:
    """The key that describes how a model's blocks are hashed."""
    return META + model


def canonical(pod: str) -> str:
    """A pod's name without the suffix that some writers add."""
    return pod.removesuffix(SUFFIX)


def stamp(now: float, epoch: int) -> int:
    """The stamp of a writer at Unix time `now`, in seconds."""
    return max(int(now), epoch)


def next_epoch(now: float, epoch: int, last: int) -> int:
    """The new epoch of a pod that is being cleared. `last` is its writer's last stamp."""
    return max(int(now), epoch, last) + 1


def floor_of(
    *, now: float, epoch: int, lease: float, max_age: float, started: float | None = None, ruled: bool = False
) -> int:
    """The smallest stamp of a pod that counts. `lease` is the end of its writer's lease; 0 if it has no writer.

    `started` is when its engine started, if that is known. A stamp of that very second may be older than the engine,
    unless the pod is `ruled` by writers of this project: these notice restarts and set epochs.
    """
    if lease >= now:
        return epoch
    return max(epoch, int(now - max_age), 0 if started is None else int(started) + (not ruled))


def stamp_of(text: bytes) -> int:
    """An entry's stamp in seconds, or `UNDATED`; `read_scripts` parses the same way."""
    found = _STAMP.fullmatch(text)
    if found is None:
        return UNDATED
    digits = found[1]
    return int(digits[: len(digits) - next((more for least, more in _UNITS if len(digits) >= least), 0)])


def number(text: bytes | str | None) -> int | None:
    """Parse a number of the small tables. None unless it is 1 to 19 digits; the scripts parse the same way."""
    digits = text.encode() if isinstance(text, str) else text
    return int(digits) if digits and digits.isdigit() and len(digits) < 20 else None


def text_of(name: bytes) -> str:
    """Decode a pod's name; different names that are not UTF-8 stay different."""
    return name.decode("utf-8", "backslashreplace")


def named(entries: Entries) -> dict[str, int]:
    """The newest stamp of each pod in one block, by canonical name; `UNDATED` only if none can be read."""
    stamps: dict[str, int] = {}
    for name, text in entries.items():
        pod, value = canonical(text_of(name)), stamp_of(text)
        known = stamps.get(pod, UNDATED)
        stamps[pod] = min(known, value) if UNDATED in (known, value) else max(known, value)
    return stamps


def count(blocks: Iterable[Entries], floors: Floors) -> dict[str, int]:
    """How many of a prompt's `blocks` each pod holds, consecutively from the start; pods without a match are absent.

    Names of reusable ends do not match. `match_script.MATCH` does the same.
    """
    counts: dict[str, int] = {}
    for position, entries in enumerate(blocks):
        held = [pod for pod, at in named(entries).items() if floors.counts(pod, at)]
        if not position:
            held = [pod for pod in held if not pod.endswith(ENDS_SUFFIX)]
        continuing = [pod for pod in held if counts.get(pod, 0) == position]
        if not continuing:
            break
        counts.update((pod, position + 1) for pod in continuing)
    return counts


def last(blocks: Sequence[Entries], floors: Floors, pods: Collection[str]) -> dict[str, int]:
    """The position of the last of `blocks` that each of `pods` holds; pods that hold none are absent.

    `pods` are canonical names. `read_scripts.LAST` does the same.
    """
    places: dict[str, int] = {}
    left = set(pods)
    for position in range(len(blocks) - 1, -1, -1):
        if not left:
            break
        stamps = named(blocks[position]) if blocks[position] else {}
        places.update((pod, position) for pod, at in stamps.items() if pod in left and floors.counts(pod, at))
        left.difference_update(places)
    return places


def floors(
    epochs: Mapping[bytes, bytes],
    leases: Mapping[bytes, bytes],
    *,
    now: float,
    max_age: float,
    starts: Mapping[str, float] | None = None,
) -> Floors:
    """Which entries count, from the small tables and from when engines started, by pod."""
    started = starts or {}
    names = {text_of(pod): pod for pod in {*epochs, *leases}}

    def row(table: Mapping[bytes, bytes], name: str) -> int:
        return number(table.get(names[name])) or 0 if name in names else 0

    return Floors(
        by_pod={
            name: floor_of(
                now=now,
                epoch=row(epochs, name),
                lease=row(leases, name),
                max_age=max_age,
                started=started.get(name),
                ruled=name in names,
            )
            for name in {*names, *started}
        },
        default=int(now - max_age),
        ruled=names.keys(),
    )


def pairs(flat: Sequence[bytes | int]) -> dict[str, int]:
    """Turn a flat list of names and counts into a dict. Raises `ValueError` if the list is malformed."""
    if len(flat) % 2:
        raise ValueError("expected pairs of a name and a count")
    names, values = flat[::2], flat[1::2]
    if {*map(type, names)} - {bytes} or {*map(type, values)} - {int}:
        raise ValueError("expected names as bytes and counts as integers")
    return dict(zip(map(text_of, cast("Sequence[bytes]", names)), cast("Sequence[int]", values), strict=True))
