"""What the commands make of their arguments."""

from __future__ import annotations

import argparse

import pytest

from matrixinfer.cli import main, serve
from matrixinfer.config import Config, KvEventsConfig


def served(*arguments: str) -> Config:
    """The configuration that `matrixinfer serve` makes of its arguments."""
    parser = argparse.ArgumentParser()
    serve.add_parser(parser.add_subparsers())
    return serve.configuration(parser.parse_args(["serve", *arguments]))


def test_a_worker_url_is_the_same_with_and_without_a_slash_at_its_end() -> None:
    config = served("--worker-urls", "http://a:1/", "http://b:2", "--kv-event-source", "http://b:2/=tcp://b:3")
    a, b = config.pods
    assert (a.name, a.url, a.kv_events) == ("a:1", "http://a:1", "discover")
    assert (b.name, b.url, b.kv_events) == ("b:2", "http://b:2", KvEventsConfig(endpoint="tcp://b:3"))


def test_a_worker_url_with_the_version_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--worker-urls", "http://a:1/v1"]) == 2
    assert "$.pods[0].url: expected a base URL without `/v1`" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--engines", "--conversations", "--turns"])
@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_a_demo_of_nothing_is_refused(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["demo", f"{flag}={value}"])
    assert left.value.code == 2
    assert f"argument {flag}: expected a whole number, at least 1, got `{value}`" in capsys.readouterr().err
