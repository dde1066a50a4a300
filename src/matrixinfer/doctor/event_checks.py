"""What is asked of one engine's KV events: where they come from, whether they come, and what they foretell."""

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
_SURE = 2
"""Tokens of a probe, whose beginning is unlike any other prompt's, by which events are known to be about it."""
_ENDPOINT_FIX = "name its PUB endpoint as kvEvents.endpoint"


def events(pod: PodFacts) -> Iterator[Verdict]:
    """Whether it is known where it publishes, for every rank."""
    ranks = max(pod.ranks, len(pod.told))
    if pod.following == "none":
        yield blind("the config says not to listen (kvEvents: none)", "leave kvEvents out, or name its endpoint")
    elif pod.feeds and len(pod.feeds) < ranks:
        yield blind(
            f"it has {ranks} data-parallel ranks, but events are followed of {len(pod.feeds)}",
            "leave kvEvents out, so that its /kv_event_sources says where each rank publishes",
        )
    elif pod.feeds:
        yield ok(f"it publishes on {', '.join(feed.source.endpoint for feed in pod.feeds)}")
    elif pod.told:
        yield blind("it publishes events, but does not tell of which model", "configure its model under `models`")
    elif pod.sources_status == 200:
        yield blind("it says that it publishes no KV events", _EVENTS_FIX)
    else:
        yield blind(
            f"it does not say where it publishes KV events (no /kv_event_sources{_status(pod.sources_status)})",
            f"{_EVENTS_FIX}; where it publishes already, {_ENDPOINT_FIX}",
        )


def ports(pod: PodFacts) -> Iterator[Verdict]:
    """Whether ranks get in each other's way: rank n binds both base ports plus n."""
    used: dict[str, list[str]] = defaultdict(list)
    for feed in pod.feeds:
        used[_address(feed.source.endpoint)].append(f"publisher{_of(pod, feed, ' of ')}")
        if feed.source.replay_endpoint is not None:
            used[_address(feed.source.replay_endpoint)].append(f"replays{_of(pod, feed, ' of ')}")
    for address, users in used.items():
        if len(users) > 1:
            yield blind(
                f"port {address.rpartition(':')[2]} is meant for {' and '.join(users)}",
                f"keep the ports of endpoint and replay_endpoint at least {len(pod.feeds)} apart, one for each rank",
            )


def connection(pod: PodFacts) -> Iterator[Verdict]:
    """Whether every publisher can be reached."""
    for feed in pod.feeds:
        where, endpoint = _of(pod, feed), feed.source.endpoint
        if _is_local(_host(endpoint)) and not _is_local(pod.host):
            yield blind(
                f"{where}it publishes on its own loopback only ({endpoint}), which cannot be reached from here",
                'bind all addresses ("endpoint":"tcp://*:5557") and name the pod\'s host in kvEvents.endpoint',
            )
        elif feed.error is not None:
            yield blind(f"{where}{endpoint} cannot be connected to: {feed.error}", _ENDPOINT_FIX)
        elif not feed.connected:
            yield blind(
                f"{where}no connection to {endpoint} comes about",
                'open the port to this host, bind it on all addresses ("endpoint":"tcp://*:5557"), and name in '
                f"kvEvents.endpoint where it publishes, not where it replays{_told(pod, endpoint)}",
            )
    if pod.feeds and all(feed.connected for feed in pod.feeds):
        yield ok("connected to its events")


def topic(pod: PodFacts) -> Iterator[Verdict]:
    """Whether its frames bear the topic that is taken."""
    for feed in pod.feeds:
        if feed.other_topics:
            got = " and ".join(f"`{name}`" for name in feed.other_topics)
            yield blind(
                f"{_of(pod, feed)}its events come under {got}, and only `{feed.source.topic}` is taken",
                "leave kvEvents.topic out, which takes every topic, or set it to the engine's",
            )


def replay(pod: PodFacts) -> Iterator[Verdict]:
    """Whether past batches can be had."""
    for feed in pod.feeds:
        where, endpoint = _of(pod, feed), feed.source.replay_endpoint
        if endpoint is None:
            yield warning(
                f"{where}no replay endpoint: after a start or a lost frame, what it holds is known in part only",
                'give the engine "replay_endpoint":"tcp://*:5558", and kvEvents.replayEndpoint where the endpoint is '
                "configured",
            )
        elif feed.replay == "silent":
            yield warning(
                f"{where}{endpoint} answers no replay: after a start or a lost frame, what it holds is known in part only",
                "open the port to this host, and name in kvEvents.replayEndpoint where it replays, not where it "
                "publishes",
            )
        elif feed.replay == "foreign":
            yield blind(
                f"{where}{endpoint} replays other batches than {feed.source.endpoint} publishes",
                "name the replay endpoint of the same engine and rank in kvEvents.replayEndpoint",
            )
    if pod.feeds and all(feed.replay == "answers" for feed in pod.feeds):
        yield ok("its past events can be replayed")


def probe(pod: PodFacts) -> Iterator[Verdict]:
    """What became of a new prompt that was sent twice: told by events, foretold, and found."""
    for feed in pod.feeds:
        if feed.probe is None:
            continue
        where = _of(pod, feed)
        if feed.probe.refused is not None:
            yield warning(
                f"{where}the probe was not computed: {feed.probe.refused}",
                "send it a prompt of some hundred tokens yourself, twice, and look at matrixinfer events tail",
            )
        elif feed.untrusted is not None:
            yield blind(f"{where}its events do not tell what it holds: {feed.untrusted}", "see docs/engines.md")
        elif feed.malformed:
            yield blind(
                f"{where}{feed.malformed} of its messages cannot be read",
                "name in kvEvents.endpoint where it publishes KV events; matrixinfer events tail shows what comes",
            )
        elif feed.probe.predicted:
            yield _compared(pod, feed, feed.probe)
        elif not feed.other_topics:
            yield from _untold(pod, feed, feed.probe)


def _compared(pod: PodFacts, feed: FeedFacts, sent: ProbeFacts) -> Verdict:
    """Its events told of the probe. The engine may find up to a block more than token blocks can tell."""
    where, foretold = _of(pod, feed), f"{sent.predicted} of {sent.tokens} tokens were foretold"
    found = sent.hits if sent.cached is None else sent.cached
    if found is None:
        return ok(f"{where}its events told of a new prompt: {foretold} to be cached")
    if found < sent.predicted:
        return warning(
            f"{where}{foretold} to be cached, and it found {found}",
            "run the doctor again when the engine is idle; where it stays so, the engine drops blocks without saying so, "
            "or has several kinds of attention",
        )
    if sent.cached is not None and found >= sent.predicted + max(pod.token_block, pod.engine_block or 1):
        return warning(
            f"{where}{foretold} to be cached, and it found {found}",
            "events are missing: look at matrixinfer events tail",
        )
    return ok(
        f"{where}a new prompt, sent twice, was foretold and found: {sent.predicted} of {sent.tokens} tokens cached"
    )


def _untold(pod: PodFacts, feed: FeedFacts, sent: ProbeFacts) -> Iterator[Verdict]:
    """No event told of the probe."""
    where, prompt = _of(pod, feed), f"a new prompt of {sent.tokens} tokens"
    if sent.elsewhere is not None:
        yield blind(
            f"{where}the events of {prompt} came from {sent.elsewhere} instead",
            "name each rank's own endpoints; the engine must take the header X-data-parallel-rank",
        )
    elif (sent.first_difference or 0) >= _SURE:
        yield blind(
            f"{where}its events tell of {prompt} with other tokens than here, from token {sent.first_difference} on",
            "give the model the tokenizer that the engine uses, or none, so that the engine's /tokenize is asked",
        )
    elif feed.frames:
        yield blind(
            f"{where}events come, but none tells of {prompt}",
            "the endpoint may be another engine's: name this one's in kvEvents.endpoint; or the engine's token ids differ",
        )
    elif feed.connected and pod.prefix_caching is not False:
        yield blind(
            f"{where}connected, but nothing came when it computed {prompt}",
            f"turn its events on (enable_kv_cache_events), or name the endpoint where it publishes"
            f"{_told(pod, feed.source.endpoint)}",
        )


def _told(pod: PodFacts, endpoint: str) -> str:
    """Where the engine itself says that it publishes, if that is elsewhere."""
    told = [source.endpoint for source in pod.told]
    return f"; it says {', '.join(told)}" if told and endpoint not in told else ""


def _of(pod: PodFacts, feed: FeedFacts, before: str = "") -> str:
    """The rank in front of a sentence (`dp1: `), or after a word; nothing for a pod that is one cache."""
    if len(pod.feeds) < 2:
        return ""
    rank = EndpointName.parse(feed.name).rank_label
    return f"{before}{rank}" if before else f"{rank}: "


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
