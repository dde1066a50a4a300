from __future__ import annotations

import json
import logging
from typing import Literal

import pytest
import structlog

from matrixinfer.config import LogConfig
from matrixinfer.telemetry.log import configure


def test_json_lines_go_to_standard_error_from_the_level_up(capsys: pytest.CaptureFixture[str]) -> None:
    configure(LogConfig(level="info", format="json"))
    log = structlog.get_logger("test")
    log.debug("hidden")
    log.info("pod_up", pod="a")
    logging.getLogger("library").warning("odd %s", "thing")
    logging.getLogger("library").info("chatter")
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second = (json.loads(line) for line in captured.err.splitlines())
    assert (first["event"], first["pod"], first["level"]) == ("pod_up", "a", "info")
    assert (second["event"], second["level"]) == ("odd thing", "warning")


def fail(log: structlog.typing.FilteringBoundLogger | logging.Logger) -> None:
    prompt = "my secret prompt"
    try:
        len(prompt) // 0
    except ZeroDivisionError:
        log.exception("request_failed")


def test_an_exception_is_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure(LogConfig(format="json"))
    fail(structlog.get_logger("test"))
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["exception"][0]["exc_type"] == "ZeroDivisionError"


@pytest.mark.parametrize("style", ["json", "console"])
def test_no_local_variable_is_logged_with_an_exception(
    style: Literal["json", "console"], capsys: pytest.CaptureFixture[str]
) -> None:
    configure(LogConfig(format=style))
    fail(structlog.get_logger("test"))
    fail(logging.getLogger("library"))
    err = capsys.readouterr().err
    assert err.count("division") >= 2
    assert "secret prompt" not in err


def test_the_console_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    configure(LogConfig(level="debug", format="console"))
    structlog.get_logger("test").debug("pod_up", pod="a")
    assert "pod_up" in capsys.readouterr().err
