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
the pod has a living writer, at most `max_age` seconds old.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
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

Entries = Mapping[bytes, bytes]
"""One block as stored in Redis: pod names to stamps."""


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


def floor_of(*, now: float, epoch: int, lease: float, max_age: float) -> int:
    """The smallest stamp of a pod that counts. `lease` is the end of its writer's lease; 0 if it has no writer."""
    return epoch if lease >= now else max(epoch, int(now - max_age))


def number(text: bytes | str | None) -> int | None:
    """Parse a count or a stamp. None unless it is 1 to 19 digits; `scripts` parses the same way."""
    digits = text.encode() if isinstance(text, str) else text
    return int(digits) if digits and digits.isdigit() and len(digits) < 20 else None


def text_of(name: bytes) -> str:
    """Decode a pod's name; different names that are not UTF-8 stay different."""
    return name.decode("utf-8", "backslashreplace")


def named(entries: Entries) -> dict[str, int]:
    """The newest stamp of each pod in one block, by canonical name. Invalid stamps are left out."""
    stamps: dict[str, int] = {}
    for name, text in entries.items():
        pod, value = canonical(text_of(name)), number(text)
        if value is not None:
            stamps[pod] = max(value, stamps.get(pod, value))
    return stamps


def count(blocks: Iterable[Entries], floors: Mapping[str, int], default: int) -> dict[str, int]:
    """How many of a prompt's `blocks` each pod holds, consecutively from the start; pods without a match are absent.

    `floors` are the smallest stamps that count, by pod; `default` applies to other pods. Names of reusable ends do not
    match. `scripts.MATCH` does the same.
    """
    counts: dict[str, int] = {}
    for position, entries in enumerate(blocks):
        held = [pod for pod, at in named(entries).items() if at >= floors.get(pod, default)]
        if not position:
            held = [pod for pod in held if not pod.endswith(ENDS_SUFFIX)]
        continuing = [pod for pod in held if counts.get(pod, 0) == position]
        if not continuing:
            break
        counts.update((pod, position + 1) for pod in continuing)
    return counts


def last(blocks: Sequence[Entries], floors: Mapping[str, int], default: int, pods: Collection[str]) -> dict[str, int]:
    """The position of the last of `blocks` that each of `pods` holds; pods that hold none are absent.

    `pods` are canonical names; the other arguments are those of `count`. `scripts.LAST` does the same.
    """
    places: dict[str, int] = {}
    left = set(pods)
    for position in range(len(blocks) - 1, -1, -1):
        if not left:
            break
        stamps = named(blocks[position]) if blocks[position] else {}
        places.update((pod, position) for pod, at in stamps.items() if pod in left and at >= floors.get(pod, default))
        left.difference_update(places)
    return places


def floors(
    epochs: Mapping[bytes, bytes], leases: Mapping[bytes, bytes], *, now: float, max_age: float
) -> dict[str, int]:
    """The smallest stamp that counts, for every pod with an epoch or a lease."""
    return {
        text_of(pod): floor_of(
            now=now, epoch=number(epochs.get(pod)) or 0, lease=number(leases.get(pod)) or 0, max_age=max_age
        )
        for pod in {*epochs, *leases}
    }


def pairs(flat: Sequence[bytes | int]) -> dict[str, int]:
    """Turn a flat list of names and counts into a dict. Raises `ValueError` if the list is malformed."""
    if len(flat) % 2:
        raise ValueError("expected pairs of a name and a count")
    names, values = flat[::2], flat[1::2]
    if {*map(type, names)} - {bytes} or {*map(type, values)} - {int}:
        raise ValueError("expected names as bytes and counts as integers")
    return dict(zip(map(text_of, cast("Sequence[bytes]", names)), cast("Sequence[int]", values), strict=True))
