"""Checks of one engine's KV events: where they are published, whether they arrive, and whether they predict hits."""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Iterator

from matrixinfer.config.endpoint_names import EndpointName
from matrixinfer.doctor.facts import FeedFacts, PodFacts, ProbeFacts
from matrixinfer.doctor.findings import Verdict, blind, ok, warning

_EVENTS_FIX = (
    'start the engine with --kv-events-config \'{"enable_kv_cache_events":true,"publisher":"zmq",'
    '"endpoint":"tcp://*:5557","replay_endpoint":"tcp://*:5558"}\''
)
_SGLANG_FIX = (
    'start the engine with --kv-events-config \'{"publisher":"zmq","endpoint":"tcp://*:5557",'
    '"replay_endpoint":"tcp://*:5657"}\''
)
_MIN_EQUAL_TOKENS = 2
"""Equal tokens at the start by which an event belongs to the probe: no other prompt starts like it."""
_ENDPOINT_FIX = "set kvEvents.endpoint to the engine's PUB endpoint"


def events(pod: PodFacts) -> Iterator[Verdict]:
    """Whether the endpoint of every rank's events is known."""
    ranks = max(pod.ranks, len(pod.reported_sources))
    if pod.following == "none":
        yield blind("the config turns KV events off (kvEvents: none)", "remove kvEvents, or set kvEvents.endpoint")
    elif pod.feeds and len(pod.feeds) < ranks:
        yield blind(
            f"the engine has {ranks} data-parallel ranks, but the gateway follows the events of {len(pod.feeds)}",
            "remove kvEvents, so that the engine says where each rank publishes (/kv_event_sources; SGLang: /server_info), "
            "and enable the events of all ranks",
        )
    elif pod.feeds:
        endpoints = ", ".join(feed.source.endpoint for feed in pod.feeds)
        expected = f"configured: events are expected on {endpoints}"
        yield ok(expected if pod.following == "configured" else f"the engine publishes on {endpoints}")
    elif pod.reported_sources:
        yield blind(
            "the engine publishes events, but does not say for which model", "configure its model under `models`"
        )
    elif pod.sources_status == 200 and pod.engine != "sglang":
        yield blind("the engine reports that it publishes no KV events", _EVENTS_FIX)
    else:
        yield blind(
            f"the engine does not say where it publishes KV events ({_unsaid(pod)})",
            f"{_SGLANG_FIX if pod.engine == 'sglang' else _EVENTS_FIX}; if it publishes already, {_ENDPOINT_FIX}",
        )


def ranks(pod: PodFacts) -> Iterator[Verdict]:
    """Whether every publisher's batches are from the rank as which it is listed."""
    for feed in pod.feeds:
        if feed.other_rank is not None:
            yield blind(
                f"{_of(pod, feed)}{feed.other_rank}",
                "remove kvEvents, or set the endpoint of each rank to its own; if the engine itself lists it wrongly, "
                "report that to the engine's maintainers",
            )


def ports(pod: PodFacts) -> Iterator[Verdict]:
    """Whether ports of ranks collide: rank n binds both base ports plus n."""
    used: dict[str, list[str]] = defaultdict(list)
    for feed in pod.feeds:
        used[_address(feed.source.endpoint)].append(f"publisher{_of(pod, feed, ' of ')}")
        if feed.source.replay_endpoint is not None:
            used[_address(feed.source.replay_endpoint)].append(f"replay{_of(pod, feed, ' of ')}")
    for address, users in used.items():
        if len(users) > 1:
            yield blind(
                f"port {address.rpartition(':')[2]} is used twice: for {' and '.join(users)}",
                f"set the ports of endpoint and replay_endpoint at least {len(pod.feeds)} apart: each rank needs its own",
            )


def connection(pod: PodFacts) -> Iterator[Verdict]:
    """Whether every publisher can be reached."""
    for feed in pod.feeds:
        where, endpoint = _of(pod, feed), feed.source.endpoint
        if _is_local(_host(endpoint)) and not _is_local(pod.host):
            yield blind(
                f"{where}the engine publishes only on its own loopback ({endpoint}), which cannot be reached from here",
                'bind all addresses ("endpoint":"tcp://*:5557"), and set kvEvents.endpoint to the address of the pod',
            )
        elif feed.error is not None:
            yield blind(f"{where}cannot connect to {endpoint}: {feed.error}", _ENDPOINT_FIX)
        elif not feed.connected:
            yield blind(
                f"{where}cannot connect to {endpoint}",
                "check that the port is open to this host, that the engine binds it on all addresses "
                '("endpoint":"tcp://*:5557"), and that kvEvents.endpoint is the one on which it publishes, not the one on '
                f"which it replays{_reported(pod, endpoint)}",
            )
    if pod.feeds and all(feed.connected for feed in pod.feeds):
        yield ok("connected to the engine's events")


def topic(pod: PodFacts) -> Iterator[Verdict]:
    """Whether its frames have the topic that the gateway accepts."""
    for feed in pod.feeds:
        if feed.other_topics:
            got = " and ".join(f"`{name}`" for name in feed.other_topics)
            yield blind(
                f"{_of(pod, feed)}events have the topic {got}, but the gateway accepts only `{feed.source.topic}`",
                "remove kvEvents.topic to accept every topic, or set it to the engine's",
            )


def limits(pod: PodFacts) -> Iterator[Verdict]:
    """What the events do not tell of the engine's cache."""
    for feed in pod.feeds:
        for words in feed.limits:
            what, _, remedy = words.partition("; ")
            yield warning(f"{_of(pod, feed)}{what}", remedy or "see docs/engines.md")


def replay(pod: PodFacts) -> Iterator[Verdict]:
    """Whether past events can be replayed."""
    for feed in pod.feeds:
        where, endpoint = _of(pod, feed), feed.source.replay_endpoint
        if endpoint is None:
            yield warning(
                f"{where}no replay endpoint: after a start or a lost frame, the gateway knows the cache only in part",
                'start the engine with "replay_endpoint":"tcp://*:5558"; if kvEvents.endpoint is set, set '
                "kvEvents.replayEndpoint too",
            )
        elif feed.replay == "silent":
            yield warning(
                f"{where}{endpoint} does not answer replay requests: after a start or a lost frame, the gateway knows the "
                "cache only in part",
                "check that the port is open to this host, and that kvEvents.replayEndpoint is the one on which the engine "
                "replays, not the one on which it publishes",
            )
        elif feed.replay == "foreign":
            yield blind(
                f"{where}{endpoint} replays different batches than {feed.source.endpoint} publishes",
                "set kvEvents.replayEndpoint to the replay endpoint of the same engine and rank",
            )
    if pod.feeds and all(feed.replay == "answers" for feed in pod.feeds):
        yield ok("past events can be replayed")


def probe(pod: PodFacts) -> Iterator[Verdict]:
    """Whether the events of a new prompt, sent twice, predicted the hit of the second request."""
    for feed in pod.feeds:
        if feed.probe is None:
            continue
        where = _of(pod, feed)
        if feed.probe.failure is not None:
            yield warning(
                f"{where}the engine did not compute the probe: {feed.probe.failure}",
                "send the engine a prompt of a few hundred tokens twice, and watch `matrixinfer events tail`",
            )
        elif feed.untrusted is not None:
            yield blind(f"{where}events do not show what the engine caches: {feed.untrusted}", "see docs/engines.md")
        elif feed.malformed:
            yield blind(
                f"{where}{feed.malformed} messages cannot be read as KV events",
                "check that kvEvents.endpoint is where the engine publishes KV events; `matrixinfer events tail` shows what "
                "arrives",
            )
        elif feed.probe.predicted:
            yield _compared(pod, feed, feed.probe)
        elif not feed.other_topics:
            yield from _unpublished(pod, feed, feed.probe)


def _compared(pod: PodFacts, feed: FeedFacts, sent: ProbeFacts) -> Verdict:
    """The events include the probe. The engine may find up to a block more than whole token blocks can predict."""
    where = _of(pod, feed)
    found = sent.hits if sent.cached is None else sent.cached
    if found is None:
        return ok(f"{where}events predict a hit of {sent.predicted} of {sent.tokens} tokens for a new prompt")
    if found < sent.predicted:
        return warning(
            f"{where}events predicted a hit of {sent.predicted} of {sent.tokens} tokens, but the engine reported {found}",
            "run the doctor again when the engine is idle. If the result is the same, the engine drops blocks without "
            "publishing that, or has several kinds of attention",
        )
    if sent.cached is not None and found >= sent.predicted + max(pod.token_block, pod.engine_block or 1):
        return warning(
            f"{where}events predicted a hit of {sent.predicted} of {sent.tokens} tokens, but the engine reported {found}",
            "events are missing: watch `matrixinfer events tail`",
        )
    return ok(f"{where}events predicted the hit of a new prompt, sent twice: {sent.predicted} of {sent.tokens} tokens")


def _unpublished(pod: PodFacts, feed: FeedFacts, sent: ProbeFacts) -> Iterator[Verdict]:
    """No event includes the probe."""
    where, prompt = _of(pod, feed), f"a new prompt of {sent.tokens} tokens"
    if sent.published_by is not None:
        yield blind(
            f"{where}the events of {prompt} came from {sent.published_by} instead",
            "set the endpoints of each rank to its own; the engine must support the header X-data-parallel-rank (SGLang: the field routed_dp_rank)",
        )
    elif (sent.first_difference or 0) >= _MIN_EQUAL_TOKENS:
        yield blind(
            f"{where}the events of {prompt} have different token ids than the gateway, from token {sent.first_difference} on",
            "set `tokenizer` of the model to the one that the engine uses, or remove it: then the gateway asks the engine's "
            "/tokenize",
        )
    elif feed.frames:
        yield blind(
            f"{where}events arrive, but none is about {prompt}",
            "set kvEvents.endpoint to this engine's, as this one may be another engine's; or correct `tokenizer`, as the "
            "engine's token ids may differ",
        )
    elif feed.connected and pod.prefix_caching is not False:
        yield blind(
            f"{where}connected, but no event arrived when the engine computed {prompt}",
            f"enable its events (enable_kv_cache_events), or set kvEvents.endpoint to where it publishes"
            f"{_reported(pod, feed.source.endpoint)}",
        )


def _reported(pod: PodFacts, endpoint: str) -> str:
    """Where the engine itself says that it publishes, if that differs from `endpoint`."""
    reported = [source.endpoint for source in pod.reported_sources]
    return f"; the engine reports {', '.join(reported)}" if reported and endpoint not in reported else ""


def _of(pod: PodFacts, feed: FeedFacts, before: str = "") -> str:
    """The rank, to put before a sentence (`dp1: `) or after a word; empty for a pod with a single cache."""
    if len(pod.feeds) < 2:
        return ""
    rank = EndpointName.parse(feed.name).rank_label
    return f"{before}{rank}" if before else f"{rank}: "


def _unsaid(pod: PodFacts) -> str:
    if pod.engine == "sglang":
        return "no publisher in /server_info"
    return f"no /kv_event_sources{_status(pod.sources_status)}"


def _status(status: int | None) -> str:
    return "" if status is None else f", HTTP {status}"


def _address(endpoint: str) -> str:
    return endpoint.partition("://")[2]


def _host(endpoint: str) -> str:
    return _address(endpoint).rpartition(":")[0].strip("[]")


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
