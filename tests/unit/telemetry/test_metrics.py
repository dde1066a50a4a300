from __future__ import annotations

from prometheus_client import Gauge
from prometheus_client.parser import text_string_to_metric_families

from matrixinfer.telemetry.metrics import Metrics


def test_everything_observed_is_exposed_under_its_documented_name() -> None:
    metrics = Metrics()
    metrics.request("tiny", 200, 0.5)
    metrics.request(None, 404, 0.1)
    metrics.first_byte(0.2)
    with metrics.at("a"):
        pass
    metrics.at("a").__enter__()
    metrics.retry("connect")
    metrics.upstream_error("a", "connect")
    metrics.decided("a", 0.001, {"match": 0.5, "tokenize": 2.0})
    metrics.degraded("tokenize")
    metrics.predicted(100, 64)
    metrics.access.refused("model")
    metrics.access.tenant_used("lab", 100, 60, None)
    metrics.access.admission(running=3, waiting=2)
    metrics.access.admitted(0.5)
    metrics.access.shed("full")
    samples = {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }
    assert samples == {
        ("matrixinfer_requests_total", ("200", "tiny")): 1,
        ("matrixinfer_requests_total", ("404", "unknown")): 1,
        ("matrixinfer_request_duration_seconds_count", ()): 2,
        ("matrixinfer_request_duration_seconds_sum", ()): 0.6,
        ("matrixinfer_time_to_first_byte_seconds_count", ()): 1,
        ("matrixinfer_time_to_first_byte_seconds_sum", ()): 0.2,
        ("matrixinfer_in_flight", ("a",)): 1,
        ("matrixinfer_retries_total", ("connect",)): 1,
        ("matrixinfer_upstream_errors_total", ("connect", "a")): 1,
        ("matrixinfer_decision_seconds_count", ()): 1,
        ("matrixinfer_decision_seconds_sum", ()): 0.001,
        ("matrixinfer_decision_stage_seconds_count", ("match",)): 1,
        ("matrixinfer_decision_stage_seconds_sum", ("match",)): 0.0005,
        ("matrixinfer_decision_stage_seconds_count", ("tokenize",)): 1,
        ("matrixinfer_decision_stage_seconds_sum", ("tokenize",)): 0.002,
        ("matrixinfer_routed_total", ("a",)): 1,
        ("matrixinfer_degraded_total", ("tokenize",)): 1,
        ("matrixinfer_engine_tokenize_seconds_count", ()): 0,
        ("matrixinfer_engine_tokenize_seconds_sum", ()): 0,
        ("matrixinfer_prompt_tokens_total", ()): 100,
        ("matrixinfer_predicted_hit_tokens_total", ()): 64,
        ("matrixinfer_access_refused_total", ("model",)): 1,
        ("matrixinfer_tenant_tokens_total", ("input", "lab")): 100,
        ("matrixinfer_tenant_tokens_total", ("cached", "lab")): 60,
        ("matrixinfer_tenant_tokens_total", ("output", "lab")): 0,
        ("matrixinfer_limits_degraded", ()): 0,
        ("matrixinfer_admission_requests", ("running",)): 3,
        ("matrixinfer_admission_requests", ("waiting",)): 2,
        ("matrixinfer_admission_wait_seconds_count", ()): 1,
        ("matrixinfer_admission_wait_seconds_sum", ()): 0.5,
        ("matrixinfer_admission_shed_total", ("full",)): 1,
    }


def test_however_many_tenants_there_are_their_series_are_bounded() -> None:
    metrics = Metrics()
    for i in range(1500):
        metrics.access.tenant_used(f"tenant-{i}", 1, 0, 0)
    series = [line for line in metrics.render().decode().splitlines() if line.startswith("matrixinfer_tenant_tokens_t")]
    assert len(series) == 3 * 1001
    assert 'matrixinfer_tenant_tokens_total{kind="input",tenant="other"} 500.0' in series


def test_two_gateways_in_one_process_share_nothing() -> None:
    one, other = Metrics(), Metrics()
    one.degraded("index")
    assert other.registry.get_sample_value("matrixinfer_degraded_total", {"reason": "index"}) is None


def test_a_registered_collector_is_exposed_with_the_rest() -> None:
    metrics = Metrics()
    metrics.register(Gauge("extra", "One more.", registry=None))
    assert b"\nextra 0.0\n" in metrics.render()


def test_the_series_of_a_pod_that_is_gone_go_with_it_also_while_a_request_is_there() -> None:
    metrics = Metrics()
    empty = metrics.render()
    with metrics.at("a"):
        metrics.decided("a", 0.001, {})
        metrics.upstream_error("a", "connect")
        metrics.drift("a", "exact", 64, 64)
        metrics.drift_window("a", "covered")
        metrics.resynced("a")
        metrics.decided("b", 0.001, {})
        assert b'pod="a"' in metrics.render()
        metrics.forget_pod("a")
    assert b'pod="a"' not in metrics.render()
    assert b'pod="b"' in metrics.render()
    metrics.request("m", 200, 0.1)
    metrics.parity("m", "chat", "usage", "agreed")
    metrics.approximate("m", "chat", True)
    metrics.request(None, 404, 0.1)
    metrics.keep_models({"m"})
    assert b'model="m"' in metrics.render()
    metrics.keep_models({"n"})
    metrics.forget_pod("b")
    shown = metrics.render()
    assert b'model="m"' not in shown
    assert b'model="unknown"' in shown
    assert b"pod=" not in shown
    assert b"pod=" not in empty
