"""How many requests are sent to engines at a time, and how the others wait."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from matrixinfer.config.base import Count, Seconds, Section, described


class AdmissionConfig(Section, frozen=True):
    """How many requests this gateway sends to engines at a time. The others wait for their turn, or are answered with 503."""

    max_concurrent_requests: Annotated[
        Count, described("Most requests at engines at a time: about what their batches hold, all together.")
    ]
    queue_size: Annotated[
        Annotated[int, Meta(ge=0)],
        described(
            "Most requests that wait. If more come, the newest of the tenant with most tokens waiting, for its weight, is "
            "answered with 503."
        ),
    ] = 1_000
    queue_timeout_seconds: Annotated[
        Seconds,
        described(
            "A request that has waited this long is answered with 503. One that would probably wait longer is, too, at once."
        ),
    ] = 30.0
