"""What in an engine's metrics shows that it has restarted, or sleeps."""

from __future__ import annotations

import pytest

from matrixinfer.pods.boot import BootMarks, is_another_run
from matrixinfer.pods.metrics_text import parse_metrics
from matrixinfer.pods.pod import Sleep

RUN = b"""\
# HELP process_start_time_seconds Start time of the process since unix epoch in seconds.
process_start_time_seconds 1.7e+09
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100"} 1.0
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
vllm:prompt_tokens_total{engine="0",model_name="tiny"} 500.0
vllm:prefix_cache_queries_total{engine="0",model_name="tiny"} 500.0
"""


def marks(text: bytes) -> BootMarks:
    return parse_metrics(text, read_at=0.0).boot


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"1.7e+09", b"1.7000001e+09"),
        (b'num_gpu_blocks="100"', b'num_gpu_blocks="90"'),
        (b'running{engine="0",model_name="tiny"}', b'running{engine="0",model_name="big"}'),
        (
            b'prompt_tokens_total{engine="0",model_name="tiny"} 500.0',
            b'prompt_tokens_total{engine="0",model_name="tiny"} 499.0',
        ),
        (b'queries_total{engine="0",model_name="tiny"} 500.0', b'queries_total{engine="0",model_name="tiny"} 0.0'),
    ],
    ids=["start time", "cache", "model", "prompt tokens", "queries"],
)
def test_a_mark_that_changed_shows_another_run(old: bytes, new: bytes) -> None:
    assert RUN.count(old) == 1
    assert is_another_run(marks(RUN), marks(RUN.replace(old, new)))


def test_an_engine_that_goes_on_is_the_same() -> None:
    later = RUN.replace(b"500.0", b"900.0").replace(b" 3.0", b" 0.0")
    assert not is_another_run(marks(RUN), marks(later))


def test_marks_that_are_absent_decide_nothing() -> None:
    assert not is_another_run(marks(RUN), marks(b""))
    assert not is_another_run(marks(b""), marks(RUN))


def sleeping(**states: int) -> bytes:
    return b"".join(
        f'vllm:engine_sleep_state{{engine="{rank}",model_name="m",sleep_state="{state}"}} {value}.0\n'.encode()
        for rank in (0, 1)
        for state, value in states.items()
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", None),
        (sleeping(awake=1, weights_offloaded=0, discard_all=0), None),
        (sleeping(awake=0, weights_offloaded=1, discard_all=0), "weights_offloaded"),
        (sleeping(awake=0, weights_offloaded=0, discard_all=1), "discard_all"),
        (sleeping(awake=0, weights_offloaded=0, discard_all=0), "paused"),
        (sleeping(weights_offloaded=1), None),
        (sleeping(awake=0, weights_offloaded=1).replace(b'engine="1",model_name="m",sleep_state="awake"} 0', b'engine="1",model_name="m",sleep_state="awake"} 1'), "weights_offloaded"),
        (b"vllm:engine_sleep_state_created 0.0\nvllm:engine_sleep_state 0.0\n", None),
    ],
)  # fmt: skip
def test_sleep_is_read_with_its_level(text: bytes, expected: Sleep | None) -> None:
    assert parse_metrics(text, read_at=0.0).sleep == expected


def test_sglang_says_its_page_size_in_a_gauge() -> None:
    text = b'sglang:page_size{model_name="m",dp_rank="0"} 64.0\nsglang:page_size{model_name="m",dp_rank="1"} 64.0\n'
    assert parse_metrics(text, read_at=0.0).block_size == 64
    assert parse_metrics(b"sglang:page_size 0.0\n", read_at=0.0).block_size is None
