from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest
import structlog

from matrixinfer.telemetry.plugin_log import MAX_KINDS, SLOW_LOG_SECONDS, PluginLog, traceback_lines


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


def failing(prompt: str) -> NoReturn:
    raise ValueError(f"cannot rate {prompt}")


def failure(prompt: str = "secret") -> ValueError:
    try:
        failing(prompt)
    except ValueError as error:
        return error


def failure_elsewhere() -> ValueError:
    try:
        int("secret")
    except ValueError as error:
        return error
    raise AssertionError


def test_a_failure_is_logged_with_its_traceback_and_without_a_prompt(logs: list[Any]) -> None:
    PluginLog(Clock()).failed("rack", "Score", failure(), "raised ValueError at rack.py:1")
    (line,) = logs
    assert (line["event"], line["log_level"]) == ("plugin_failed", "error")
    assert (line["plugin"], line["stage"], line["reason"]) == ("rack", "Score", "raised ValueError at rack.py:1")
    outer, inner, kind = line["traceback"]
    assert outer.rpartition("/")[2].startswith("test_plugin_log.py:")
    assert outer.endswith(":failure")
    assert inner.endswith(":failing")
    assert kind == "ValueError"
    assert "secret" not in json.dumps(line)


def test_each_kind_is_logged_once(logs: list[Any]) -> None:
    watch = PluginLog(Clock())
    for _ in range(3):
        watch.failed("rack", "Score", failure("one"), "r")
        watch.failed("rack", "Score", failure("two"), "r")
        watch.failed("zone", "Score", failure("one"), "r")
        watch.failed("rack", "Score", failure_elsewhere(), "r")
    assert [line["plugin"] for line in logs] == ["rack", "zone", "rack"]


def test_the_number_of_kinds_is_bounded_and_the_end_is_said(logs: list[Any]) -> None:
    watch = PluginLog(Clock())
    for i in range(MAX_KINDS + 10):
        watch.failed("rack", "Score", type(f"Error{i}", (Exception,), {})(), "r")
    assert len(logs) == MAX_KINDS + 1
    assert (logs[-1]["event"], logs[-1]["kinds"]) == ("plugin_log_filled", MAX_KINDS)


def test_causes_follow_the_error_that_they_caused() -> None:
    def chained() -> None:
        try:
            failing("secret")
        except ValueError as error:
            raise KeyError("secret") from error

    with pytest.raises(KeyError) as caught:
        chained()
    lines = traceback_lines(caught.value)
    assert lines[-1] == "ValueError"
    assert lines[lines.index("caused by") - 1] == "KeyError"
    assert "secret" not in "".join(lines)


def test_a_cause_that_is_suppressed_is_not_shown() -> None:
    def suppressed() -> None:
        try:
            failing("secret")
        except ValueError:
            raise KeyError from None

    with pytest.raises(KeyError) as caught:
        suppressed()
    assert "caused by" not in traceback_lines(caught.value)


def test_a_deep_traceback_is_cut_in_the_middle() -> None:
    def deeper() -> None:
        deeper()

    with pytest.raises(RecursionError) as caught:
        deeper()
    lines = traceback_lines(caught.value)
    assert len(lines) == 32
    assert "…" in lines


def test_causes_that_go_in_a_circle_end() -> None:
    error = ValueError()
    error.__cause__ = KeyError()
    error.__cause__.__cause__ = error
    assert traceback_lines(error).count("caused by") == 3


def test_a_slow_plugin_is_logged_once_a_minute_with_its_slow_calls(logs: list[Any]) -> None:
    clock = Clock()
    watch = PluginLog(clock)
    for _ in range(5):
        watch.slow("rack", "Score", 0.1234)
    watch.slow("rack", "Filter", 0.2)
    clock.now += SLOW_LOG_SECONDS
    watch.slow("rack", "Score", 0.5)
    assert [(line["event"], line["log_level"]) for line in logs] == [("plugin_ran_slow", "warning")] * 3
    shown = [(line["plugin"], line["stage"], line["milliseconds"], line["calls"]) for line in logs]
    assert shown == [("rack", "Score", 123.4, 1), ("rack", "Filter", 200.0, 1), ("rack", "Score", 500.0, 5)]


def test_broken_plugins_are_logged(logs: list[Any]) -> None:
    PluginLog(Clock()).skipped({"rack": "cannot be imported"})
    assert logs == [
        {"event": "plugin_skipped", "log_level": "warning", "plugin": "rack", "reason": "cannot be imported"}
    ]


class Unreadable(Exception):
    @property
    def __cause__(self) -> Any:  # type: ignore[override]
        raise SystemExit("secret")


class Placeless(Exception):
    @property
    def __traceback__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("secret")


@pytest.mark.parametrize("error", [Unreadable, Placeless])
def test_an_error_that_cannot_be_read_is_logged_once_without_a_traceback(
    error: type[Exception], logs: list[Any]
) -> None:
    watch = PluginLog(Clock())
    for _ in range(2):
        watch.failed("rack", "Score", error(), "raised an error that cannot be read")
    (line,) = logs
    assert line["traceback"] == []
    assert "secret" not in json.dumps(line)
