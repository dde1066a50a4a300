"""What lies where in Redis, and which of it counts. Pure.

    matrix:kv:block:{model}@{hash}    hash: pod -> Unix seconds of the writer's stamp, as decimal text
    matrix:kv:meta:{model}            hash: block_size, hash_scheme, version

The first is the layout that MatrixInfer and kthena use. The rest is ours; the braces are a hash tag of Redis Cluster, which
keeps the small tables in one slot, so that one script may change them together:

    {matrix:kv}:epochs     pod -> stamp below which its entries do not count
    {matrix:kv}:stamps     pod -> the last stamp of its writer
    {matrix:kv}:tokens     pod -> fencing token of its writer
    {matrix:kv}:writers    pod -> who that is
    {matrix:kv}:leases     pod -> Unix seconds until which the writer is believed to be alive
    {matrix:kv}:states     pod -> JSON: how far the writer believes the pod's events, and what it learned of its blocks

**A logical clock, as a stamp has only seconds.** A writer stamps `max(now, epoch)`. To clear a pod its epoch becomes
`max(now, epoch, last stamp) + 1`, so whatever was stamped before does not count, and whatever is stamped afterwards does,
within the same second or with a clock that goes back. An entry counts if its stamp is at least its pod's epoch and,
where no living writer vouches for the pod, at most `max_age` seconds old.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from matrixinfer.config import CLUSTER_SUFFIX

BLOCKS = "matrix:kv:block:"
META = "matrix:kv:meta:"
EPOCHS = "{matrix:kv}:epochs"
STAMPS = "{matrix:kv}:stamps"
TOKENS = "{matrix:kv}:tokens"
WRITERS = "{matrix:kv}:writers"
LEASES = "{matrix:kv}:leases"
STATES = "{matrix:kv}:states"

SUFFIX = CLUSTER_SUFFIX
"""What some writers add to a pod's name, and others do not."""

Entries = Mapping[bytes, bytes]
"""One block as Redis holds it: names of pods, and stamps."""


def prefix_of(model: str) -> str:
    """What the keys of a model's blocks begin with; the decimal hash follows."""
    return f"{BLOCKS}{model}@"


def block_of(key: str) -> tuple[str, int] | None:
    """The model and the hash that a block's key names; None for other keys."""
    model, separator, block = key.removeprefix(BLOCKS).rpartition("@")
    if not key.startswith(BLOCKS) or not separator or not block.isdecimal():
        return None
    return model, int(block)


def meta_key(model: str) -> str:
    """Where a model's scheme is told."""
    return META + model


def canonical(pod: str) -> str:
    """The name by which pods are compared, whoever wrote it."""
    return pod.removesuffix(SUFFIX)


def stamp(now: float, epoch: int) -> int:
    """What a writer writes at Unix time `now`."""
    return max(int(now), epoch)


def next_epoch(now: float, epoch: int, last: int) -> int:
    """The epoch of a pod that is cleared, whose writer's last stamp was `last`."""
    return max(int(now), epoch, last) + 1


def floor_of(*, now: float, epoch: int, lease: float, max_age: float) -> int:
    """The least stamp of a pod that counts."""
    return epoch if lease >= now else max(epoch, int(now - max_age))


def number(text: bytes | str | None) -> int | None:
    """A count or a stamp as Redis holds it; None for what is not 1 to 19 digits, as everywhere in `scripts`."""
    digits = text.encode() if isinstance(text, str) else text
    return int(digits) if digits and digits.isdigit() and len(digits) < 20 else None


def text_of(name: bytes) -> str:
    """A pod's name; names that are no UTF-8 stay different from each other."""
    return name.decode("utf-8", "backslashreplace")


def named(entries: Entries) -> dict[str, int]:
    """The newest stamp of each pod at one block, by canonical name. What is no stamp is left out."""
    stamps: dict[str, int] = {}
    for name, text in entries.items():
        pod, value = canonical(text_of(name)), number(text)
        if value is not None:
            stamps[pod] = max(value, stamps.get(pod, value))
    return stamps


def count(blocks: Iterable[Entries], floors: Mapping[str, int], default: int) -> dict[str, int]:
    """How many of a prompt's `blocks` each pod holds consecutively from the start; pods that hold none are absent.

    `floors` are the least stamps that count, `default` that of pods without one. The script in `scripts` does the same.
    """
    counts: dict[str, int] = {}
    for position, entries in enumerate(blocks):
        held = [pod for pod, at in named(entries).items() if at >= floors.get(pod, default)]
        going_on = [pod for pod in held if counts.get(pod, 0) == position]
        if not going_on:
            break
        counts.update((pod, position + 1) for pod in going_on)
    return counts


def floors(
    epochs: Mapping[bytes, bytes], leases: Mapping[bytes, bytes], *, now: float, max_age: float
) -> dict[str, int]:
    """The least stamp that counts of every pod that has an epoch or a lease."""
    return {
        text_of(pod): floor_of(
            now=now, epoch=number(epochs.get(pod)) or 0, lease=number(leases.get(pod)) or 0, max_age=max_age
        )
        for pod in {*epochs, *leases}
    }


def pairs(flat: Sequence[bytes | int]) -> dict[str, int]:
    """Names and counts that came as one list. Raises `ValueError` for what is no such list."""
    if len(flat) % 2:
        raise ValueError("names and counts do not pair up")
    names, values = flat[::2], flat[1::2]
    if {*map(type, names)} - {bytes} or {*map(type, values)} - {int}:
        raise ValueError("neither name nor count")
    return dict(zip(map(text_of, cast("Sequence[bytes]", names)), cast("Sequence[int]", values), strict=True))
