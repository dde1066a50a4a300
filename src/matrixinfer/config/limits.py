"""What is bounded, and what happens when pods fail: limits, connections, retries, ejection, health."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from matrixinfer.config.base import Count, Seconds, Section, Share, described


class LimitsConfig(Section, frozen=True):
    """Limits on requests."""

    max_body_bytes: Annotated[Count, described("Larger request bodies are answered with 413.")] = 64 * 1024 * 1024
    memory_bytes: Annotated[
        Annotated[int, Meta(ge=16 * 1024 * 1024)],
        described(
            "Memory for all requests together. Bytes of bodies count twice until the answer ends, because they are kept and "
            "rewritten; what is decoded from them counts while it is tokenized. Bodies beyond it are answered with 503. An "
            "eighth is kept free for small requests."
        ),
    ] = 2 * 1024 * 1024 * 1024
    body_timeout_seconds: Annotated[
        Seconds, described("A request whose body takes longer to arrive is answered with 408.")
    ] = 60.0
    request_timeout_seconds: Annotated[
        Seconds, described("A request ends after this long, however much of its answer has come.")
    ] = 3600.0
    first_byte_timeout_seconds: Annotated[
        Seconds,
        described(
            "A request is answered with 504 when the first byte of its answer takes longer. Answers that are not streamed "
            "begin when they are complete."
        ),
    ] = 600.0
    idle_timeout_seconds: Annotated[
        Seconds,
        described("A stream ends when its pod sends nothing, or its client reads nothing, for this long."),
    ] = 300.0
    connect_timeout_seconds: Annotated[Seconds, described("Deadline of one attempt to connect to a pod.")] = 5.0
    max_attempts: Annotated[Count, described("Most pods tried before the first byte.")] = 3


class ConnectionsConfig(Section, frozen=True):
    """Limits on clients' connections."""

    max: Annotated[
        Count | None,
        described(
            "Most connections of clients at a time; further ones are answered with 503. By default a third of the file "
            "descriptors that this process may have, which leaves enough for engines and the admin listener."
        ),
    ] = None
    head_timeout_seconds: Annotated[
        Seconds, described("A connection whose request line and headers take longer to arrive is closed with 408.")
    ] = 15.0
    keep_alive_seconds: Annotated[
        Seconds, described("How long a connection without a request is kept. Balancers in front should close earlier.")
    ] = 75.0


class DrainConfig(Section, frozen=True):
    """What happens after SIGTERM. A second signal cuts off what is left."""

    delay_seconds: Annotated[
        Annotated[float, Meta(ge=0)],
        described(
            "How long requests are still accepted while `/ready` answers 503, so that balancers can notice. Ctrl-C skips it."
        ),
    ] = 3.0
    timeout_seconds: Annotated[
        Annotated[float, Meta(ge=0)], described("How long requests in flight may then take to finish.")
    ] = 30.0


class RetriesConfig(Section, frozen=True):
    """When a request is sent to another pod. Never after the first byte of an answer; `limits.maxAttempts` bounds the pods."""

    statuses: Annotated[
        tuple[Annotated[int, Meta(ge=400, le=599)], ...],
        described("Statuses of an answer that is not passed on while another pod may be tried."),
    ] = (429, 502, 503, 504)
    after_send: Annotated[
        Annotated[int, Meta(ge=0)],
        described(
            "How many further pods get a request that a pod received and did not answer, as it broke the connection or went "
            "down: the request itself may be what breaks engines."
        ),
    ] = 1
    budget_share: Annotated[
        Share, described("Retries allowed per request, so that retries cannot multiply an overload.")
    ] = 0.2
    budget_per_second: Annotated[
        Annotated[float, Meta(ge=0)], described("Retries per second that are allowed however few requests there are.")
    ] = 10.0
    jitter_seconds: Annotated[
        Annotated[float, Meta(ge=0)],
        described("Longest random pause before a retry. It doubles with each further one."),
    ] = 0.02


class OutliersConfig(Section, frozen=True):
    """Endpoints that fail requests are ejected: for a while they get none."""

    consecutive_failures: Annotated[
        Count,
        described(
            "Failures in a row after which an endpoint is ejected: server errors, broken connections, malformed answers "
            "and timeouts. 429 and 503 count as busy, not as failures, and failures that are the request's fault do not count."
        ),
    ] = 3
    failure_share: Annotated[
        Annotated[float, Meta(gt=0, le=1)],
        described("Share of failed requests in `windowSeconds` from which on an endpoint is ejected."),
    ] = 0.5
    min_requests: Annotated[Count, described("Fewest requests in `windowSeconds` that make a share.")] = 10
    window_seconds: Annotated[Seconds, described("How far back the failure share looks.")] = 30.0
    eject_seconds: Annotated[
        Seconds, described("Length of the first ejection. Each further one lasts twice as long.")
    ] = 5.0
    max_eject_seconds: Annotated[Seconds, described("Length of the longest ejection.")] = 300.0
    max_ejected_share: Annotated[
        Share,
        described(
            "Largest share of a model's endpoints, rounded up, that is left out of a decision because of ejections. At "
            "least one always remains. 0 turns ejection off."
        ),
    ] = 0.5
    busy_seconds: Annotated[
        Seconds,
        described("How long an endpoint that answers 429 or 503 without a `Retry-After` is left alone, at first."),
    ] = 1.0
    max_busy_seconds: Annotated[Seconds, described("How long a `Retry-After` is honoured at most.")] = 30.0


class PodWatchConfig(Section, frozen=True):
    """How pods are observed."""

    scrape_interval_seconds: Annotated[
        Seconds, described("Time between two reads of a pod's `/health` and `/metrics`.")
    ] = 1.0
    scrape_timeout_seconds: Annotated[Seconds, described("Deadline of one read.")] = 2.0
    stale_after_seconds: Annotated[Seconds, described("Engine metrics older than this count as unknown.")] = 5.0
    unhealthy_after_failures: Annotated[
        Count,
        described("After this many failed reads or requests in a row, a pod is used only as a last resort."),
    ] = 2
    discovery_interval_seconds: Annotated[
        Seconds, described("Time between two questions to a pod what it is (`/v1/models` and others).")
    ] = 30.0
