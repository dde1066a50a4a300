"""Facts to findings, one row per finding. The tests of the command show that real faults lead to them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from matrixinfer.config import KvEventsConfig, ModelConfig
from matrixinfer.doctor.checks import check_fleet
from matrixinfer.doctor.facts import FeedFacts, FleetFacts, ForeignFacts, PodFacts, ProbeFacts, RedisFacts
from matrixinfer.doctor.findings import Finding, summarize
from matrixinfer.doctor.gather import seconds_ahead
from matrixinfer.pods.publishers import KvSource
from matrixinfer.pods.registry import ServedNames
from matrixinfer.prompt.samples import SampleFacts
from matrixinfer.trust.sent_ids.found import Outcome, Probed

PROBE = ProbeFacts(tokens=400, predicted=384, cached=384, hits=384)
FEED = FeedFacts(
    name="a",
    source=KvEventsConfig(endpoint="tcp://10.0.0.1:5557", replay_endpoint="tcp://10.0.0.1:5558"),
    connected=True,
    frames=1,
    block_size=16,
    clock_ahead=0.0,
    replay="answers",
    probe=PROBE,
)
SAMPLE = SampleFacts(name="a text", compared=True)
SOURCE = KvSource(endpoint="tcp://10.0.0.1:5557", rank=0)
SERVED = ServedNames(base_model="m", aliases=frozenset({"m"}), adapters={}, engine="vllm", context_length=8192)
POD = PodFacts(
    name="a",
    url="http://10.0.0.1:8001",
    host="10.0.0.1",
    token_block=128,
    following="discover",
    version="0.32.0",
    served=SERVED,
    models_status=200,
    sources_status=200,
    reported_sources=(SOURCE,),
    prefix_caching=True,
    block_size=16,
    clock_ahead=0.0,
    samples=(SAMPLE,),
    feeds=(FEED,),
)


def feed(**changes: Any) -> PodFacts:
    return replace(POD, feeds=(replace(FEED, **changes),))


def probe(**changes: Any) -> PodFacts:
    return feed(probe=replace(PROBE, **changes))


def sent_ids(outcome: Outcome, why: str) -> PodFacts:
    return replace(POD, sent_ids=(Probed(path="/v1/chat/completions", outcome=outcome, why=why),))


def bad(*pods: PodFacts, models: tuple[ModelConfig, ...] = ()) -> list[Finding]:
    return [found for found in check_fleet(FleetFacts(models=models, pods=pods)) if found.level != "ok"]


def test_a_healthy_pod_has_only_ok_findings() -> None:
    assert bad(POD, models=(ModelConfig(name="m"),)) == []


NO_HIT: dict[str, Any] = {"predicted": 0, "cached": 0, "hits": 0}
ROWS: list[tuple[str, PodFacts, str, str, str]] = [
    ("down", replace(POD, down="refused"), "health", "blind", "the engine does not answer: refused"),
    ("0.19", replace(POD, version="0.19.1"), "engine", "warning", "omit salts and some adapters"),
    ("limits", feed(limits=("hits may be longer; leave it",)), "limits", "warning", "hits may be longer"),
    ("hides both", feed(hides_salts=True, hides_adapters=True), "engine", "warning", "its events omit salts and adapters"),
    ("no release hides", replace(feed(hides_salts=True), version=None), "engine", "warning", "whose events omit salts"),
    ("sglang", replace(POD, engine="sglang", version="0.5.22"), "engine", "warning", "the engine is SGLang 0.5.22, whose events omit"),
    ("sglang hides", replace(POD, engine="sglang", version=None, feeds=(replace(FEED, hides_salts=True),)), "engine", "warning", "SGLang of unknown version, whose events omit salts"),
    ("sglang off", replace(POD, engine="sglang", reported_sources=(), feeds=(), sources_status=404), "events", "blind", "(no publisher in /server_info)"),
    ("paused", replace(POD, asleep="paused"), "sleep", "warning", "the engine sleeps (paused): it gets requests only"),
    ("asleep", replace(POD, asleep="discard_all"), "sleep", "warning", "sleeps (discard_all), and its cache is empty"),
    ("other rank", replace(POD, feeds=(replace(FEED, other_rank="its batches say rank 1"),)), "ranks", "blind", "its batches say rank 1"),
    ("models refused", replace(POD, served=None, models_status=401), "model", "warning", "(HTTP 401 from /v1/models): it requires"),
    ("models failed", replace(POD, served=None, models_status=None), "model", "warning", "(HTTP error from /v1/models)"),
    ("caching off", replace(POD, prefix_caching=False), "caching", "blind", "prefix caching is off"),
    ("not heard", replace(POD, following="none", feeds=()), "events", "blind", "kvEvents: none"),
    ("off", replace(POD, reported_sources=(), feeds=()), "events", "blind", "reports that it publishes no KV events"),
    ("no path", replace(POD, reported_sources=(), feeds=(), sources_status=404), "events", "blind", "HTTP 404"),
    ("no answer", replace(POD, reported_sources=(), feeds=(), sources_status=None), "events", "blind", "(no /kv_event_sources)"),
    ("no model", replace(POD, feeds=()), "events", "blind", "does not say for which model"),
    ("ranks by metrics", replace(POD, ranks=2), "events", "blind", "2 data-parallel ranks"),
    ("ranks by sources", replace(POD, reported_sources=(SOURCE,) * 4), "events", "blind", "4 data-parallel ranks"),
    ("not reached", feed(connected=False, probe=None), "connection", "blind", "cannot connect to tcp://10.0.0.1:5557"),
    ("no endpoint", feed(connected=False, error="bad"), "connection", "blind", "cannot connect to tcp://10.0.0.1:5557: bad"),
    (
        "loopback",
        feed(source=KvEventsConfig(endpoint="tcp://127.0.0.1:5557", replay_endpoint="tcp://10.0.0.1:5558")),
        "connection",
        "blind",
        "only on its own loopback",
    ),
    ("topic", feed(other_topics=("x", "y"), probe=replace(PROBE, **NO_HIT)), "topic", "blind", "the topic `x` and `y`"),
    ("no replay", feed(source=KvEventsConfig(endpoint="tcp://10.0.0.1:5557"), replay=None), "replay", "warning", "no replay"),
    ("mute replay", feed(replay="silent"), "replay", "warning", "does not answer replay requests"),
    ("other's replay", feed(replay="foreign"), "replay", "blind", "replays different batches"),
    ("refused", feed(probe=ProbeFacts(failure="answered 400")), "probe", "warning", "not compute the probe: answered 400"),
    ("untrusted", feed(untrusted="pairs"), "probe", "blind", "do not show what the engine caches: pairs"),
    ("malformed", feed(malformed=3), "probe", "blind", "3 messages cannot be read"),
    ("silent", replace(probe(predicted=0), feeds=(replace(FEED, frames=0, probe=replace(PROBE, predicted=0)),)), "probe", "blind", "connected, but no event arrived"),
    ("others' events", probe(predicted=0), "probe", "blind", "events arrive, but none is about"),
    ("others' prompt", probe(predicted=0, first_difference=0), "probe", "blind", "events arrive, but none is about"),
    ("other tokens", probe(predicted=0, first_difference=7), "probe", "blind", "from token 7 on"),
    ("other rank", probe(predicted=0, published_by="dp1"), "probe", "blind", "came from dp1 instead"),
    ("less", probe(cached=16), "probe", "warning", "a hit of 384 of 400 tokens, but the engine reported 16"),
    ("more", probe(predicted=128), "probe", "warning", "but the engine reported 384"),
    ("no details", probe(cached=None), "usage", "warning", "do not report how many tokens were cached"),
    ("no details, no count", probe(cached=None, hits=None), "usage", "warning", "do not report how many tokens"),
    ("small", feed(block_size=8), "blocks", "warning", "blocks have 8 tokens"),
    ("large", feed(block_size=2048), "blocks", "warning", "prompts shorter than 2048 tokens"),
    ("straddling", feed(block_size=48), "blocks", "warning", "neither divides the other"),
    ("short context", replace(POD, served=replace(SERVED, context_length=128)), "blocks", "blind", "no prompt ever fills"),
    ("differs", replace(POD, samples=(replace(SAMPLE, first_difference=3),)), "tokens", "blind", "a text differs from token 3"),
    ("not here", replace(POD, samples=(SampleFacts(name="a chat", gateway_error="no template"),)), "tokens", "blind", "no template"),
    ("nowhere", replace(POD, samples=(SampleFacts(name="a chat", gateway_error="x", engine_error="y"),)), "tokens", "blind", "a chat cannot"),
    ("not there", replace(POD, samples=(SampleFacts(name="a chat", engine_error="404"),)), "tokens", "warning", "could not be compared"),
    ("ignores ids", sent_ids("ignored", "it answers the messages"), "sent ids", "warning", "/v1/chat/completions gets no token ids (ignored): it answers the messages"),
    ("other answer", sent_ids("differs", "it is another"), "sent ids", "warning", "gets no token ids (differs): it is another"),
    ("fast clock", replace(POD, clock_ahead=3.4), "clock", "warning", "3 s ahead of"),
    ("slow clock", feed(clock_ahead=-90.0), "clock", "warning", "90 s behind"),
]  # fmt: skip


@pytest.mark.parametrize(("pod", "check", "level", "words"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_problem_is_reported_with_its_fix(pod: PodFacts, check: str, level: str, words: str) -> None:
    (found,) = bad(pod)
    assert (found.pod, found.check, found.level) == ("a", check, level)
    assert words in found.message
    assert found.fix


@pytest.mark.parametrize(
    "pod",
    [
        feed(clock_ahead=-1.9),
        probe(cached=400, predicted=384),
        probe(cached=384 + 127),
        replace(
            POD,
            samples=(SampleFacts(name="a chat with tools", gateway_error="x", engine_error="y", optional=True), SAMPLE),
        ),
        replace(POD, samples=(SampleFacts(name="a text"),)),
        replace(POD, version="0.24.0"),
        replace(POD, version=None),
        replace(POD, served=replace(SERVED, context_length=None)),
        replace(POD, following="configured", reported_sources=()),
    ],
)
def test_values_within_bounds_are_no_problem(pod: PodFacts) -> None:
    assert bad(pod) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [(128, 16, "which hides up to 112 tokens of each hit; 16 would hide none"), (16, 16, None), (16, 128, None)],
)
def test_token_blocks_that_are_larger_than_the_engines_get_a_comment(ours: int, theirs: int, words: str | None) -> None:
    pod = replace(POD, token_block=ours, feeds=(replace(FEED, block_size=theirs),))
    (found,) = [each for each in check_fleet(FleetFacts(pods=(pod,), models=())) if each.check == "blocks"]
    assert (found.level, found.message.endswith(words or f"blocks.size is {ours}")) == ("ok", True)


@pytest.mark.parametrize(("wait", "level"), [(5.0, "warning"), (6.5, "ok")])
def test_engines_that_tokenize_later_than_decisions_wait_are_a_problem(wait: float, level: str) -> None:
    asking = {"answers": 9, "failures": 0, "p50_ms": 6.46, "p90_ms": 9.44}
    pod = replace(POD, samples=(replace(SAMPLE, compared=False),), asking=asking, wait_ms=wait)
    (found,) = [each for each in check_fleet(FleetFacts(pods=(pod,), models=())) if each.check == "tokens"]
    assert (found.level, "most are made without token ids" in found.message) == (level, level == "warning")


def test_an_endpoint_of_the_config_is_not_said_to_come_from_the_engine() -> None:
    pod = replace(POD, following="configured", reported_sources=())
    said = {finding.message for finding in check_fleet(FleetFacts(pods=(pod,), models=()))}
    assert f"configured: events are expected on {FEED.source.endpoint}" in said


def test_a_prompt_without_hit_and_events_shows_that_caching_is_off() -> None:
    pod = replace(POD, prefix_caching=None, feeds=(replace(FEED, frames=0, probe=replace(PROBE, **NO_HIT)),))
    assert [found.check for found in bad(pod)] == ["caching", "probe"]


def test_the_engines_hit_counter_replaces_missing_usage() -> None:
    (less, details) = bad(probe(cached=None, hits=16))
    assert (less.check, details.check) == ("probe", "usage")
    assert less.message.endswith("but the engine reported 16")
    assert [found.check for found in bad(probe(cached=None, hits=2000))] == [
        "usage"
    ]  # other requests may have added to it


def ranks(*endpoints: tuple[int, int]) -> PodFacts:
    feeds = [
        replace(
            FEED,
            name=f"a@dp{rank}",
            source=KvEventsConfig(endpoint=f"tcp://h:{publish}", replay_endpoint=f"tcp://h:{replay}"),
        )
        for rank, (publish, replay) in enumerate(endpoints)
    ]
    return replace(POD, feeds=tuple(feeds))


def test_ranks_whose_ports_are_too_close_collide() -> None:
    assert bad(ranks((5557, 5657), (5558, 5658))) == []
    collisions = [found.message for found in bad(ranks((5557, 5558), (5558, 5559), (5559, 5560)))]
    assert collisions == [
        "port 5558 is used twice: for replay of dp0 and publisher of dp1",
        "port 5559 is used twice: for replay of dp1 and publisher of dp2",
    ]


def test_a_fault_of_one_rank_names_it() -> None:
    pod = ranks((5557, 5657), (5558, 5658))
    pod = replace(pod, feeds=(pod.feeds[0], replace(pod.feeds[1], replay="silent")))
    (found,) = bad(pod)
    assert found.message.startswith("dp1: tcp://h:5658 does not answer replay requests")


def test_a_model_that_no_pod_serves() -> None:
    other, both = ModelConfig(name="n"), (ModelConfig(name="x", aliases=("m",)), ModelConfig(name="n"))
    assert [(found.pod, found.check, found.level) for found in bad(POD, models=(other,))] == [
        ("a", "model", "warning"),
        (None, "models", "blind"),
    ]
    assert [found.message for found in bad(POD, models=both)] == ["no pod serves the configured model n"]


def test_an_unserved_model_is_not_reported_while_a_pod_is_down() -> None:
    down = replace(POD, name="b", down="refused", served=None, feeds=())
    assert [found.check for found in bad(POD, down, models=(ModelConfig(name="m"), ModelConfig(name="n")))] == [
        "health"
    ]


def test_pods_of_one_model_with_different_blocks_and_one_publisher() -> None:
    b = replace(POD, name="b", feeds=(replace(FEED, name="b", block_size=32),))
    assert [(found.pod, found.check, found.level) for found in bad(POD, b)] == [
        (None, "block sizes", "warning"),
        (None, "publishers", "blind"),
    ]
    assert "m have different block sizes (16 tokens on a; 32 tokens on b)" in bad(POD, b)[0].message


def test_the_worst_finding_decides_the_exit_code() -> None:
    def code(*pods: PodFacts) -> int:
        return summarize(check_fleet(FleetFacts(models=(), pods=pods)), len(pods)).exit_code

    warned, blind = feed(replay="silent"), replace(POD, prefix_caching=False)
    assert [code(POD), code(warned), code(warned, blind)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("date", "expected"),
    [
        ("Thu, 01 Jan 1970 00:16:40 GMT", 0.0),
        ("Thu, 01 Jan 1970 00:16:39 GMT", -0.2),
        ("Thu, 01 Jan 1970 00:16:30 GMT", -9.2),
        ("Thu, 01 Jan 1970 00:17:00 GMT", 19.6),
        ("yesterday", None),
        (None, None),
    ],
)
def test_a_date_header_is_read_to_the_second(date: str | None, expected: float | None) -> None:
    measured = seconds_ahead(date, 1000.2, 1000.4)
    assert measured == (None if expected is None else pytest.approx(expected))


REDIS = RedisFacts(
    where="10.0.0.9:6379",
    is_index=True,
    writer="agents",
    scheme={"block_size": "128", "hash_scheme": "prefix"},
    clock_ahead=0.0,
    endpoints_written=frozenset({"a"}),
)


@pytest.mark.parametrize(
    ("changes", "check", "level", "words"),
    [
        ({"error": "Connection refused"}, "redis", "blind", "does not answer: Connection refused"),
        ({"error": "Connection refused", "is_index": False}, "redis", "warning", "does not answer"),
        ({"slow": True}, "redis", "warning", "more than half of the lookup deadline"),
        ({"refuses_scripts": True}, "redis", "warning", "nothing can be written"),
        ({"clock_ahead": -30.0}, "redis", "warning", "differs from the local one by 30 s"),
        (
            {"schemes": {"m": {"block_size": "16", "hash_scheme": "prefix"}}},
            "scheme",
            "blind",
            "blocks of m in Redis never match: block_size is 16 there and 128 here",
        ),
        ({"endpoints_written": frozenset()}, "writers", "blind", "writes for a"),
        (
            {"error": "WRONGPASS", "failure": "login", "username": "u"},
            "redis",
            "blind",
            "refuses the login of the user `u`",
        ),
        (
            {"error": "NOPERM", "failure": "permission"},
            "redis",
            "blind",
            "does not let the default user read the index",
        ),
        (
            {"unreadable": ("{matrix:kv}:epochs",)},
            "redis",
            "warning",
            "`{matrix:kv}:epochs` in Redis holds something else",
        ),
        (
            {"foreign": ForeignFacts(probed=True, mismatches=(("they differ", "fix it"),))},
            "matches",
            "blind",
            "they differ",
        ),
        ({"foreign": ForeignFacts(probed=True, absent=("m",))}, "matches", "warning", "new prompt of m did not appear"),
        (
            {"foreign": ForeignFacts(probed=True, fits=("m",), without_start=("a",))},
            "matches",
            "warning",
            "a do not report",
        ),
        ({"foreign": ForeignFacts(probed=False)}, "matches", "warning", "not known whether lookups can match"),
    ],
)
def test_what_is_wrong_with_redis(changes: dict[str, Any], check: str, level: str, words: str) -> None:
    fleet = FleetFacts(models=(), pods=(POD,), redis=replace(REDIS, **changes), endpoints=("a",))
    (finding,) = [found for found in check_fleet(fleet) if found.level != "ok"]
    assert (finding.check, finding.level) == (check, level)
    assert words in finding.message
    assert finding.fix


def test_a_healthy_redis_has_only_ok_findings() -> None:
    found = check_fleet(FleetFacts(models=(), pods=(POD,), redis=REDIS, endpoints=("a",)))
    assert {finding.level for finding in found} == {"ok"}
    assert [finding.check for finding in found if finding.pod is None] == ["redis", "writers"]


def test_agents_are_not_expected_when_gateways_write() -> None:
    redis = replace(REDIS, writer="gateway", endpoints_written=frozenset())
    found = check_fleet(FleetFacts(models=(), pods=(POD,), redis=redis, endpoints=("a",)))
    assert {finding.level for finding in found} == {"ok"}
