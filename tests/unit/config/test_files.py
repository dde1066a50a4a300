from __future__ import annotations

from pathlib import Path

from matrixinfer.config import parse, parse_pods
from matrixinfer.config.files import stamp, with_absolute_files

SECTIONS = """
tls: {certFile: a.pem, keyFile: b.pem}
redis: {tls: {caFile: c.pem}}
engineTls: {caFile: /d.pem}
engineKeys: {apiKeyFile: e}
models: [{name: m, apiKeyFile: f}]
pods: [{name: p, url: "https://h:1", apiKeyFile: g, tls: {caFile: h.pem}}]
access: {keysFile: i, jwt: {issuer: x, audience: [y], jwksFile: j}, isolation: {secretFile: k}}
accessLog: {path: l, keyFile: m}
"""


def test_files_of_every_section_start_from_the_config_file() -> None:
    config = parse(SECTIONS, base=Path("/base"))
    assert config.tls is not None
    assert (config.tls.cert_file, config.tls.key_file) == ("/base/a.pem", "/base/b.pem")
    assert config.redis is not None
    assert config.redis.tls is not None
    assert config.redis.tls.ca_file == "/base/c.pem"
    assert config.engine_tls is not None
    assert config.engine_tls.ca_file == "/d.pem"
    assert config.engine_keys.api_key_file == "/base/e"
    assert config.models[0].api_key_file == "/base/f"
    assert config.pods[0].api_key_file == "/base/g"
    assert config.pods[0].tls is not None
    assert config.pods[0].tls.ca_file == "/base/h.pem"
    access, log = config.access, config.access_log
    assert access is not None
    assert access.jwt is not None
    assert access.isolation is not None
    assert (access.keys_file, access.jwt.jwks_file, access.isolation.secret_file) == ("/base/i", "/base/j", "/base/k")
    assert log is not None
    assert (log.path, log.key_file) == ("/base/l", "/base/m")


def test_files_of_listed_pods_start_from_the_list() -> None:
    (pod,) = parse_pods('[{name: p, url: "https://h:1", apiKeyFile: a, tls: {caFile: b}}]', base=Path("/base"))
    assert pod.tls is not None
    assert (pod.api_key_file, pod.tls.ca_file) == ("/base/a", "/base/b")


def test_a_link_is_followed_whenever_the_file_is_read(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "key").write_text(name)
    (tmp_path / "current").symlink_to("old")
    named = parse("engineKeys: {apiKeyFile: current/key}", base=tmp_path).engine_keys.api_key_file
    assert named is not None
    before = stamp(named)
    (tmp_path / "next").symlink_to("new")
    (tmp_path / "next").replace(tmp_path / "current")
    assert Path(named).read_text() == "new"
    assert stamp(named) != before


def test_a_section_without_files_stays_what_it_is() -> None:
    config = parse("{}", base=Path("/base"))
    assert with_absolute_files(config, Path("/elsewhere")) is config
