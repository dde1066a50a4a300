"""From facts to findings, a row per diagnosis. That each sentence is said of a real fault, the command's tests show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from matrixinfer.config import KvEventsConfig, ModelConfig
from matrixinfer.doctor.checks import diagnose
from matrixinfer.doctor.facts import FeedFacts, FleetFacts, PodFacts, ProbeFacts, RedisFacts, SampleFacts
from matrixinfer.doctor.findings import Finding, sum_up
from matrixinfer.doctor.gather import ahead
from matrixinfer.pods.registry import ServedNames

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
SAMPLE = SampleFacts(what="a text", compared=True)
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
    told=(FEED.source,),
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


def bad(*pods: PodFacts, models: tuple[ModelConfig, ...] = ()) -> list[Finding]:
    return [found for found in diagnose(FleetFacts(models=models, pods=pods)) if found.level != "ok"]


def test_a_healthy_pod_has_nothing_but_good_findings() -> None:
    assert bad(POD, models=(ModelConfig(name="m"),)) == []


UNSEEN: dict[str, Any] = {"predicted": 0, "cached": 0, "hits": 0}
ROWS: list[tuple[str, PodFacts, str, str, str]] = [
    ("down", replace(POD, down="refused"), "health", "blind", "it does not answer: refused"),
    ("0.19", replace(POD, version="0.19.1"), "engine", "warning", "hide salts and some adapters"),
    ("hides both", feed(hides_salts=True, hides_adapters=True), "engine", "warning", "its events hide salts and adapters"),
    ("no release hides", replace(feed(hides_salts=True), version=None), "engine", "warning", "whose events hide salts"),
    ("sglang", replace(POD, served=replace(SERVED, engine="sglang")), "engine", "warning", "it is SGLang"),
    ("models refused", replace(POD, served=None, models_status=401), "model", "warning", "(HTTP 401 from /v1/models): it wants"),
    ("models failed", replace(POD, served=None, models_status=None), "model", "warning", "(HTTP error from /v1/models)"),
    ("caching off", replace(POD, prefix_caching=False), "caching", "blind", "prefix caching is off"),
    ("not heard", replace(POD, following="none", feeds=()), "events", "blind", "kvEvents: none"),
    ("off", replace(POD, told=(), feeds=()), "events", "blind", "it publishes no KV events"),
    ("no path", replace(POD, told=(), feeds=(), sources_status=404), "events", "blind", "HTTP 404"),
    ("no answer", replace(POD, told=(), feeds=(), sources_status=None), "events", "blind", "(no /kv_event_sources)"),
    ("no model", replace(POD, feeds=()), "events", "blind", "does not tell of which model"),
    ("ranks by metrics", replace(POD, ranks=2), "events", "blind", "2 data-parallel ranks"),
    ("ranks by sources", replace(POD, told=(FEED.source,) * 4), "events", "blind", "4 data-parallel ranks"),
    ("not reached", feed(connected=False, probe=None), "connection", "blind", "no connection to tcp://10.0.0.1:5557"),
    ("no endpoint", feed(connected=False, error="bad"), "connection", "blind", "cannot be connected to: bad"),
    (
        "loopback",
        feed(source=KvEventsConfig(endpoint="tcp://127.0.0.1:5557", replay_endpoint="tcp://10.0.0.1:5558")),
        "connection",
        "blind",
        "its own loopback only",
    ),
    ("topic", feed(other_topics=("x", "y"), probe=replace(PROBE, **UNSEEN)), "topic", "blind", "under `x` and `y`"),
    ("no replay", feed(source=KvEventsConfig(endpoint="tcp://10.0.0.1:5557"), replay=None), "replay", "warning", "no replay"),
    ("mute replay", feed(replay="silent"), "replay", "warning", "answers no replay"),
    ("other's replay", feed(replay="foreign"), "replay", "blind", "replays other batches"),
    ("refused", feed(probe=ProbeFacts(refused="answered 400")), "probe", "warning", "not computed: answered 400"),
    ("untrusted", feed(untrusted="pairs"), "probe", "blind", "do not tell what it holds: pairs"),
    ("malformed", feed(malformed=3), "probe", "blind", "3 of its messages cannot be read"),
    ("silent", replace(probe(predicted=0), feeds=(replace(FEED, frames=0, probe=replace(PROBE, predicted=0)),)), "probe", "blind", "connected, but nothing came"),
    ("others' events", probe(predicted=0), "probe", "blind", "events come, but none tells"),
    ("others' prompt", probe(predicted=0, first_difference=0), "probe", "blind", "events come, but none tells"),
    ("other tokens", probe(predicted=0, first_difference=7), "probe", "blind", "from token 7 on"),
    ("other rank", probe(predicted=0, elsewhere="dp1"), "probe", "blind", "came from dp1 instead"),
    ("less", probe(cached=16), "probe", "warning", "384 of 400 tokens were foretold to be cached, and it found 16"),
    ("more", probe(predicted=128), "probe", "warning", "and it found 384"),
    ("no details", probe(cached=None), "usage", "warning", "do not tell how many tokens were cached"),
    ("no details, no count", probe(cached=None, hits=None), "usage", "warning", "do not tell how many tokens"),
    ("small", feed(block_size=8), "blocks", "warning", "its blocks have 8 tokens"),
    ("large", feed(block_size=2048), "blocks", "warning", "prompts shorter than 2048 tokens"),
    ("straddling", feed(block_size=48), "blocks", "warning", "neither divides the other"),
    ("short context", replace(POD, served=replace(SERVED, context_length=128)), "blocks", "blind", "no prompt ever fills"),
    ("differs", replace(POD, samples=(replace(SAMPLE, first_difference=3),)), "tokens", "blind", "a text differs from token 3"),
    ("not here", replace(POD, samples=(SampleFacts(what="a chat", here="no template"),)), "tokens", "blind", "no template"),
    ("nowhere", replace(POD, samples=(SampleFacts(what="a chat", here="x", there="y"),)), "tokens", "blind", "a chat cannot"),
    ("not there", replace(POD, samples=(SampleFacts(what="a chat", there="404"),)), "tokens", "warning", "could not be compared"),
    ("fast clock", replace(POD, clock_ahead=3.4), "clock", "warning", "3 s ahead of"),
    ("slow clock", feed(clock_ahead=-90.0), "clock", "warning", "90 s behind"),
]  # fmt: skip


@pytest.mark.parametrize(("pod", "check", "level", "words"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_what_is_wrong_is_said_with_its_remedy(pod: PodFacts, check: str, level: str, words: str) -> None:
    (found,) = bad(pod)
    assert (found.pod, found.check, found.level) == ("a", check, level)
    assert words in found.says
    assert found.fix


@pytest.mark.parametrize(
    "pod",
    [
        feed(clock_ahead=-1.9),
        probe(cached=400, predicted=384),
        probe(cached=384 + 127),
        replace(POD, samples=(SampleFacts(what="a chat with tools", here="x", there="y", optional=True), SAMPLE)),
        replace(POD, samples=(SampleFacts(what="a text"),)),
        replace(POD, version="0.24.0"),
        replace(POD, version=None),
        replace(POD, served=replace(SERVED, context_length=None)),
        replace(POD, following="configured", told=()),
    ],
)
def test_what_is_within_bounds_is_well(pod: PodFacts) -> None:
    assert bad(pod) == []


def test_a_prompt_that_leaves_no_trace_tells_of_caching_that_is_off() -> None:
    pod = replace(POD, prefix_caching=None, feeds=(replace(FEED, frames=0, probe=replace(PROBE, **UNSEEN)),))
    assert [found.check for found in bad(pod)] == ["caching", "probe"]


def test_the_engine_s_own_count_stands_in_for_what_answers_do_not_tell() -> None:
    (less, details) = bad(probe(cached=None, hits=16))
    assert (less.check, details.check) == ("probe", "usage")
    assert less.says.endswith("and it found 16")
    assert [found.check for found in bad(probe(cached=None, hits=2000))] == ["usage"]  # others' requests may be in it


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


def test_ranks_whose_ports_are_too_near_collide() -> None:
    assert bad(ranks((5557, 5657), (5558, 5658))) == []
    collisions = [found.says for found in bad(ranks((5557, 5558), (5558, 5559), (5559, 5560)))]
    assert collisions == [
        "port 5558 is meant for replays of dp0 and publisher of dp1",
        "port 5559 is meant for replays of dp1 and publisher of dp2",
    ]


def test_a_fault_of_one_rank_names_it() -> None:
    pod = ranks((5557, 5657), (5558, 5658))
    pod = replace(pod, feeds=(pod.feeds[0], replace(pod.feeds[1], replay="silent")))
    (found,) = bad(pod)
    assert found.says.startswith("dp1: tcp://h:5658 answers no replay")


def test_a_model_that_no_pod_serves() -> None:
    other, both = ModelConfig(name="n"), (ModelConfig(name="x", aliases=("m",)), ModelConfig(name="n"))
    assert [(found.pod, found.check, found.level) for found in bad(POD, models=(other,))] == [
        ("a", "model", "warning"),
        (None, "models", "blind"),
    ]
    assert [found.says for found in bad(POD, models=both)] == ["no pod serves the configured model n"]


def test_who_serves_a_model_is_not_known_while_a_pod_has_not_told() -> None:
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
    assert "m have blocks of different sizes (16 tokens on a; 32 tokens on b)" in bad(POD, b)[0].says


def test_the_worst_finding_decides_the_exit_code() -> None:
    def code(*pods: PodFacts) -> int:
        return sum_up(diagnose(FleetFacts(models=(), pods=pods)), len(pods)).exit_code

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
def test_a_clock_is_read_to_the_second(date: str | None, expected: float | None) -> None:
    measured = ahead(date, 1000.2, 1000.4)
    assert measured == (None if expected is None else pytest.approx(expected))


REDIS = RedisFacts(
    where="10.0.0.9:6379",
    looks_up=True,
    writer="agents",
    scheme={"block_size": "128", "hash_scheme": "prefix"},
    clock_ahead=0.0,
    vouched=frozenset({"a"}),
)


@pytest.mark.parametrize(
    ("changes", "check", "level", "says"),
    [
        ({"error": "Connection refused"}, "redis", "blind", "cannot be asked: Connection refused"),
        ({"error": "Connection refused", "looks_up": False}, "redis", "warning", "cannot be asked"),
        ({"slow": True}, "redis", "warning", "more than half of the look-ups' deadline"),
        ({"refuses_scripts": True}, "redis", "warning", "nothing can be written"),
        ({"clock_ahead": -30.0}, "redis", "warning", "differs from the one here by 30 s"),
        (
            {"schemes": {"m": {"block_size": "16", "hash_scheme": "prefix"}}},
            "scheme",
            "blind",
            "blocks of m in Redis never match: block_size 16 there and 128 here",
        ),
        ({"vouched": frozenset()}, "writers", "blind", "no agent is alive for a"),
    ],
)
def test_what_is_wrong_with_redis(changes: dict[str, Any], check: str, level: str, says: str) -> None:
    fleet = FleetFacts(models=(), pods=(POD,), redis=REDIS.but(**changes), endpoints=("a",))
    (finding,) = [found for found in diagnose(fleet) if found.level != "ok"]
    assert (finding.check, finding.level) == (check, level)
    assert says in finding.says
    assert finding.fix


def test_a_redis_of_which_all_is_well() -> None:
    found = diagnose(FleetFacts(models=(), pods=(POD,), redis=REDIS, endpoints=("a",)))
    assert {finding.level for finding in found} == {"ok"}
    assert [finding.check for finding in found if finding.pod is None] == ["redis", "writers"]


def test_agents_are_not_missed_where_gateways_write() -> None:
    redis = REDIS.but(writer="gateway", vouched=frozenset())
    found = diagnose(FleetFacts(models=(), pods=(POD,), redis=redis, endpoints=("a",)))
    assert {finding.level for finding in found} == {"ok"}
