from __future__ import annotations

import io
import json
import logging
import threading
from typing import ClassVar, Literal

import pytest
import structlog

from matrixinfer.config import LogConfig
from matrixinfer.errors import InvalidRequest
from matrixinfer.telemetry.log import LogStream, configure


def test_json_lines_go_to_standard_error_from_the_level_up(capsys: pytest.CaptureFixture[str]) -> None:
    configure(LogConfig(level="info", format="json"))
    log = structlog.get_logger("test")
    log.debug("hidden")
    log.info("pod_up", pod="a")
    logging.getLogger("library").warning("odd thing")
    logging.getLogger("library").info("chatter")
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second = (json.loads(line) for line in captured.err.splitlines())
    assert (first["event"], first["pod"], first["level"]) == ("pod_up", "a", "info")
    assert (second["event"], second["level"]) == ("odd thing", "warning")


def fail(log: structlog.typing.FilteringBoundLogger | logging.Logger) -> None:
    prompt = "my secret prompt"
    try:
        int(prompt)
    except ValueError:
        log.exception("request_failed")


def test_an_exception_is_one_json_line_with_its_kind_and_its_way(capsys: pytest.CaptureFixture[str]) -> None:
    configure(LogConfig(format="json"))
    fail(structlog.get_logger("test"))
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert entry["error"] == "ValueError"
    assert entry["trace"][-1].endswith(" fail")


def test_an_error_of_ours_says_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    configure(LogConfig(format="json"))
    error = InvalidRequest("`model` is required")
    error.__cause__ = KeyError("secret")
    structlog.get_logger("test").warning("refused", exc_info=error)
    entry = json.loads(capsys.readouterr().err)
    assert (entry["error"], entry["cause"]) == ("`model` is required", "KeyError")


@pytest.mark.parametrize("style", ["json", "console"])
def test_nothing_that_an_error_quotes_is_logged(
    style: Literal["json", "console"], capsys: pytest.CaptureFixture[str]
) -> None:
    configure(LogConfig(format=style))
    fail(structlog.get_logger("test"))
    fail(logging.getLogger("library"))
    err = capsys.readouterr().err
    assert err.count("ValueError") >= 2
    assert "secret prompt" not in err


def test_a_library_cannot_fill_the_log_or_quote_what_a_peer_sent(capsys: pytest.CaptureFixture[str]) -> None:
    configure(LogConfig(format="json"))
    for number in range(50):
        logging.getLogger("library").warning("bad request from %s", f"secret {number}")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["event"] == "bad request from %s"


class Full(io.StringIO):
    """A disk without room."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("style", ["json", "console"])
def test_lines_that_cannot_be_written_are_counted_and_survived(style: Literal["json", "console"]) -> None:
    stream = configure(LogConfig(format=style), Full())
    structlog.get_logger("test").warning("pod_went_down", pod="a")
    assert stream.dropped >= 1
    before = stream.dropped
    logging.getLogger("library").warning("odd")
    assert stream.dropped > before
    closed = io.StringIO()
    closed.close()
    stream = configure(LogConfig(format=style), closed)
    structlog.get_logger("test").warning("pod_went_down", pod="a")
    assert stream.dropped >= 1


def test_the_console_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    configure(LogConfig(level="debug", format="console"))
    structlog.get_logger("test").debug("pod_up", pod="a")
    assert "pod_up" in capsys.readouterr().err


def test_a_line_is_written_in_one_piece_whatever_others_write_meanwhile() -> None:
    class Stream(io.StringIO):
        pieces: ClassVar[list[str]] = []

        def write(self, text: str) -> int:
            self.pieces.append(text)
            return len(text)

    stream = LogStream(Stream())
    print("one", file=stream)
    stream.write("ha")
    other = threading.Thread(target=lambda: print("other", file=stream))
    other.start()
    other.join()
    stream.write("lf\n")
    assert Stream.pieces == ["one\n", "other\n", "half\n"]
