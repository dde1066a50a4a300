from __future__ import annotations

from pathlib import Path

import pytest

from matrixinfer.config import name_server, parse, parse_pods
from matrixinfer.errors import ConfigError


def discovery(text: str) -> str:
    """The complaint about a `discovery` section."""
    with pytest.raises(ConfigError) as error:
        parse(f"discovery: {text}", base=Path("/etc/matrixinfer"))
    return str(error.value)


def test_the_path_of_a_file_starts_from_the_config_file() -> None:
    config = parse("discovery: {files: [{path: pods.yaml}]}", base=Path("/etc/matrixinfer"))
    assert config.discovery.files[0].path == "/etc/matrixinfer/pods.yaml"
    assert config.discovery.sources[0].source == "file:/etc/matrixinfer/pods.yaml"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{dns: [{name: x}]}", "$.discovery.dns[0].port: expected the port"),
        ("{dns: [{name: x, type: srv, port: 1}]}", "$.discovery.dns[0].port: expected no port"),
        ("{dns: [{name: '.', port: 1}]}", "$.discovery.dns[0].name: expected a DNS name"),
        ("{dns: [{name: x, port: 1}, {name: x, port: 1}]}", "$.discovery.dns[1]: is the same source as"),
        ("{files: [{path: ''}]}", "$.discovery.files[0].path: expected the path"),
        ("{files: [{path: a, every: 1}]}", "$.discovery.files[0].every: unknown key"),
        (
            "{dns: [{name: x, port: 1, nameservers: [dns.example]}]}",
            "$.discovery.dns[0].nameservers[0]: expected an IP",
        ),
    ],
)
def test_a_bad_source_is_refused_with_its_path(text: str, complaint: str) -> None:
    assert discovery(text).startswith(complaint)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1", ("10.0.0.1", 53)),
        ("10.0.0.1:8600", ("10.0.0.1", 8600)),
        ("fd00::1", ("fd00::1", 53)),
        ("[fd00::1]:8600", ("fd00::1", 8600)),
    ],
)
def test_name_servers(text: str, address: tuple[str, int]) -> None:
    assert name_server(text, path="p") == address


@pytest.mark.parametrize("text", ["", "10.0.0.1:0", "10.0.0.1:x", "10.0.0.1:70000", "host", "fd00::1]:5"])
def test_no_name_servers(text: str) -> None:
    with pytest.raises(ConfigError):
        name_server(text, path="p")


LISTED = '[{"name": "a", "url": "http://a:1/"}, {"name": "b", "url": "http://b:1", "kvEvents": "none"}]'


@pytest.mark.parametrize(
    "text",
    [LISTED, f'{{"pods": {LISTED}}}', "- {name: a, url: 'http://a:1'}\n- {name: b, url: 'http://b:1', kvEvents: none}"],
)
def test_a_list_of_pods_is_read_in_the_form_of_the_config_file(text: str) -> None:
    pods = parse_pods(text, base=Path())
    assert [(pod.name, pod.url, pod.kv_events) for pod in pods] == [
        ("a", "http://a:1", "discover"),
        ("b", "http://b:1", "none"),
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "$.pods: expected a list of pods, got nothing"),
        ("{}", "$.pods: expected a list of pods, got dict"),
        ("{pods: [], more: 1}", "$.pods: expected a list of pods, got dict"),
        ("[{name: a}]", "$.pods[0]: missing the required key `url`"),
        ("[{name: a, url: 'http://a', weight: 1}]", "$.pods[0].weight: unknown key"),
        ("[{name: a, url: 'http://a'}, {name: a, url: 'http://b'}]", "$.pods[1].name: the name `a` is already taken"),
        ("[{name: a, url: 'ftp://a'}]", "$.pods[0].url: expected `http://host:port`"),
        ("[", "$: not valid YAML"),
    ],
)
def test_a_bad_list_is_refused_with_the_path_of_its_fault(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_pods(text, base=Path())
    assert str(error.value).startswith(complaint)


def test_an_empty_list_is_a_list() -> None:
    assert parse_pods("[]", base=Path()) == ()


def test_files_of_listed_pods_start_from_the_folder_of_the_list() -> None:
    (pod,) = parse_pods('[{"name": "a", "url": "https://a:1", "tls": {"caFile": "ca.pem"}}]', base=Path("/lists"))
    assert pod.tls is not None
    assert pod.tls.ca_file == "/lists/ca.pem"
    with pytest.raises(ConfigError, match=r"\$\.pods\[0\]\.tls\.keyFile"):
        parse_pods('[{"name": "a", "url": "https://a:1", "tls": {"certFile": "c.pem"}}]', base=Path("/lists"))


@pytest.mark.parametrize("name", ["", "a\\u0000", "a\\nb", "a\\u001b[31m", "n" * 254])
def test_a_name_that_would_break_headers_or_logs_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"\$\.pods\[0\]\.name: expected 1 to 253 printable"):
        parse_pods(f'[{{"name": "{name}", "url": "http://a:1"}}]', base=Path())
