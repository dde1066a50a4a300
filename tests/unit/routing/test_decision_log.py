from __future__ import annotations

from msgspec.structs import replace

from matrixinfer.routing.decision_log import PODS_KEPT, DecisionLog, Record, record
from matrixinfer.scheduler.framework import Candidate, Condition, Decision, SchedulingRequest


def decision(request_id: str = "r", *, pods: int = 2, filtered: int = 0) -> Decision:
    candidates = [
        Candidate(name=f"p{i}", url="", matched_blocks=i, trust="exact", engine_block=16, in_flight=i)
        for i in range(pods)
    ]
    ranked, removed = candidates[filtered:], candidates[:filtered]
    return Decision(
        request=SchedulingRequest(
            id=request_id, model="m", prompt_tokens=100, block_size=16, chain=range(6), prefix=b"secret"
        ),
        candidates=candidates,
        ranked=ranked[::-1],
        filtered={each.name: "bounded-load: busy" for each in removed},
        scores={"kvcache-aware": {each.name: 10.0 * i for i, each in enumerate(ranked)}},
        totals={each.name: 10.0 * i for i, each in enumerate(ranked)},
        timings_ms={"kvcache-aware": 0.01},
        notes=("a note",),
    )


def kept(request_id: str = "r", pod: str | None = None) -> Record:
    made = record(decision(request_id), "/v1/completions", [], {})
    if pod is not None:
        made.attempts.append(pod)
    return made


def test_a_retry_forgets_the_status_of_the_pod_that_broke_off() -> None:
    made = kept()
    made.answered(200)
    made.failed()
    made.moved("p0")
    assert (made.attempts, made.status) == (["p1", "p0"], None)


def test_a_record_says_why_and_what_came_of_it() -> None:
    made = record(decision(pods=3, filtered=1), "/v1/completions", ["degraded"], {"parse": 0.5})
    made.status, made.counted, made.cached = 200, 100, 32
    view = made.view()
    assert (view["chosen"], view["ranked"], view["predicted_hit_tokens"]) == ("p2", ["p2", "p1"], 32)
    assert view["reported"] == {
        "attempts": ["p2"],
        "sent_ids": False,
        "status": 200,
        "prompt_tokens": 100,
        "cached_tokens": 32,
    }
    pods = view["pods"]
    assert isinstance(pods, dict)
    assert list(pods) == ["p2", "p1", "p0"]
    assert pods["p0"]["filtered"] == "bounded-load: busy"
    assert pods["p0"]["scores"] == {"kvcache-aware": None}
    assert (pods["p1"]["trust"], pods["p1"]["credit"], pods["p1"]["in_flight"]) == ("exact", 1, 1)
    assert view["notes"] == ["degraded", "a note"]
    assert view["timings_ms"] == {"parse": 0.5, "kvcache-aware": 0.01}


def test_a_record_carries_what_the_decision_used() -> None:
    pod = Candidate(
        name="a",
        url="",
        in_flight=2,
        foreign=3,
        queued_tokens=900,
        queue_seconds=0.45678,
        condition=Condition(prefill_rate=2_000.04, held_tokens=90_000, cache_tokens=100_000, evicted_per_second=12.34),
        running=4,
        waiting=1,
        metrics_age=0.25049,
    )
    made = replace(decision(), candidates=[pod], ranked=[pod], expected_ms={"a": 512.34})
    kept = record(made, "/", [], {})
    assert kept.expected_ms == {"a": 512.34}
    pods = kept.view()["pods"]
    assert isinstance(pods, dict)
    shown = {
        "in_flight": 2,
        "foreign": 3,
        "running": 4,
        "waiting": 1,
        "metrics_age_s": 0.25,
        "queued_tokens": 900,
        "queue_ms": 456.8,
        "prefill_tokens_per_second": 2_000.0,
        "held_tokens": 90_000,
        "cache_tokens": 100_000,
        "evicted_tokens_per_second": 12.3,
        "expected_ms": 512.3,
    }
    assert {key: pods["a"][key] for key in shown} == shown


def test_the_best_of_many_pods_are_kept() -> None:
    made = record(decision(pods=100), "/", [], {})
    assert [each.name for each in made.kept] == [f"p{i}" for i in range(99, 99 - PODS_KEPT, -1)]
    assert (len(made.totals), len(made.scores["kvcache-aware"]), made.pods) == (PODS_KEPT, PODS_KEPT, 100)
    assert len(record(decision(pods=100), "/", [], {}, pods=None).kept) == 100


def test_nothing_of_the_prompt_is_kept() -> None:
    assert "secret" not in repr(kept())
    assert not hasattr(kept(), "chain")


def test_the_log_keeps_the_newest_and_finds_them_by_request_and_pod() -> None:
    log = DecisionLog(3)
    for request_id, pod in (("a", None), ("b", "p0"), ("c", None), ("b", None)):
        log.add(kept(request_id, pod))
    assert len(log) == 3
    assert [each.id for each in log.newest()] == ["b", "c", "b"]
    assert [each.attempts for each in log.newest(request_id="b")] == [["p1"], ["p1", "p0"]]
    assert [each.id for each in log.newest(pod="p0")] == ["b"]
    assert list(log.newest(request_id="a")) == []


def test_a_log_of_no_size_keeps_nothing() -> None:
    log = DecisionLog(0)
    log.add(kept())
    assert len(log) == 0
