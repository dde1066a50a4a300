"""When a writer is sure of what Redis holds."""

from __future__ import annotations

from typing import Any, cast

from matrixinfer.index.redis.writer import BlockWriter
from matrixinfer.kvevents.tiers import index_names


class Store:
    is_cluster = False


def test_a_writer_is_sure_of_an_endpoint_only_with_all_names_that_it_writes() -> None:
    writer = BlockWriter(cast("Any", Store()), meta={}, max_age=1)
    names = list(index_names("a"))

    def take(name: str, *, has_lease: bool = True) -> None:
        writer.follow(name)
        record = writer._pods[name]
        record.lease, record.needs_resync = cast("Any", object()) if has_lease else None, False

    assert not writer.is_sure("a", names)
    take("a")
    assert writer.is_sure("a", names)
    take("a~ends", has_lease=False)
    assert not writer.is_sure("a", names)
    take("a~ends")
    assert writer.is_sure("a", names)
    writer._pods["a~ends"].needs_resync = True
    assert not writer.is_sure("a", names)
