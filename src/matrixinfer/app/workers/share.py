"""The part of a gateway's limits that one of its workers keeps."""

from __future__ import annotations

import msgspec

from matrixinfer.config import Config


def share_of(config: Config) -> Config:
    """The configuration of one of `config.workers` workers: together they keep the limits of the gateway."""
    replace, count = msgspec.structs.replace, config.workers
    limits, connections, admission = config.limits, config.connections, config.admission
    if admission is not None:
        admission = replace(
            admission,
            max_concurrent_requests=-(-admission.max_concurrent_requests // count),
            queue_size=-(-admission.queue_size // count),
        )
    least = 16 * 1024 * 1024  # the least that the schema allows
    return replace(
        config,
        admission=admission,
        limits=replace(limits, memory_bytes=max(least, limits.memory_bytes // count)),
        connections=replace(connections, max=None if connections.max is None else -(-connections.max // count)),
        retries=replace(config.retries, budget_per_second=config.retries.budget_per_second / count),
    )
