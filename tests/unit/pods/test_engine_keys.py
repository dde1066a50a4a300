from __future__ import annotations

from pathlib import Path

import pytest
from yarl import URL

from matrixinfer.config import Config, PodConfig, parse
from matrixinfer.config.secrets import Secret
from matrixinfer.errors import ConfigError
from matrixinfer.pods import engine_keys
from matrixinfer.pods.engine_keys import EngineKeys
from matrixinfer.pods.registry import PodRegistry, ServedNames
from tests.waiting import eventually

CONFIG = """
models:
  - {name: alpha, aliases: [first], apiKeyEnv: ALPHA}
  - {name: beta}
pods:
  - {name: own, url: "http://own:8000/", apiKeyFile: own.key}
  - {name: of-model, url: "http://shared:8000/alpha", model: alpha}
  - {name: by-alias, url: "http://alias:8000", model: first}
  - {name: common, url: "http://shared:8000"}
  - {name: other, url: "http://other:8000", model: beta}
engineKeys: {apiKeyEnv: COMMON}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own.key").write_text("k-own\n")
    monkeypatch.setenv("ALPHA", "k-alpha")
    monkeypatch.setenv("COMMON", "k-common")
    return tmp_path


def keys_of(config: Config) -> tuple[EngineKeys, PodRegistry]:
    registry = PodRegistry(config.pods, config.models, config.pod_watch, clock=lambda: 0.0)
    return EngineKeys(config, registry), registry


def test_a_pod_s_own_key_comes_before_its_model_s_and_the_common_one(folder: Path) -> None:
    keys, registry = keys_of(parse(CONFIG, base=folder))
    keys.load()
    found = {pod.name: keys.of(pod) for pod in registry.pods}
    assert found == {
        "own": Secret("k-own"),
        "of-model": Secret("k-alpha"),
        "by-alias": Secret("k-alpha"),
        "common": Secret("k-common"),
        "other": Secret("k-common"),
    }


def test_a_model_that_the_engine_reports_decides_as_well(folder: Path) -> None:
    keys, registry = keys_of(parse(CONFIG, base=folder))
    registry.learn("common", served=ServedNames(base_model="alpha", aliases=frozenset({"alpha"}), adapters={}))
    assert keys.at("http://shared:8000") == Secret("k-alpha")


def test_a_question_gets_the_key_of_the_pod_whose_url_it_is_below(folder: Path) -> None:
    keys, _ = keys_of(parse(CONFIG, base=folder))
    assert keys.for_url(URL("http://own:8000/v1/models")) == Secret("k-own")
    assert keys.for_url(URL("http://shared:8000/alpha/health?x=/y")) == Secret("k-alpha")
    assert keys.for_url(URL("http://shared:8000/alphabet/health")) == Secret("k-common")
    assert keys.for_url(URL("http://elsewhere:8000/v1/models")) is None
    assert keys.for_url(URL("http://own:8001/v1/models")) is None
    assert keys.for_url(URL("https://own:8000/v1/models")) is None


def test_the_default_port_may_be_written_or_not(folder: Path) -> None:
    config = parse('pods: [{name: a, url: "http://A:80", apiKeyFile: own.key}]', base=folder)
    keys, _ = keys_of(config)
    assert keys.for_url(URL("http://a/v1/models")) == Secret("k-own")
    assert keys.at(config.pods[0].url) == Secret("k-own")


def test_pods_that_join_bring_their_key_and_pods_that_leave_take_it(folder: Path) -> None:
    keys, registry = keys_of(parse(CONFIG, base=folder))
    registry.join(PodConfig(name="new", url="http://new:1", api_key_file=str(folder / "own.key")))
    registry.join(PodConfig(name="broken", url="http://broken:1", api_key_file=str(folder / "none.key")))
    assert keys.at("http://new:1") == Secret("k-own")
    assert keys.at("http://broken:1") is None
    registry.leave("new")
    assert keys.at("http://new:1") is None


def test_a_key_that_is_missing_at_the_start_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse(CONFIG, base=folder)
    monkeypatch.delenv("ALPHA")
    with pytest.raises(ConfigError) as caught:
        keys_of(config)[0].load()
    assert caught.value.path == "$.models[0].apiKeyEnv"


def test_a_pod_names_one_place(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse("pods: [{name: a, url: 'http://a', apiKeyFile: x, apiKeyEnv: Y}]", base=folder)
    assert caught.value.path == "$.pods[0].apiKeyEnv"


async def test_a_file_is_read_again_and_a_bad_one_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_keys, "REREAD_SECONDS", 0.001)
    keys, registry = keys_of(parse(CONFIG, base=folder))
    pod, file = registry.pods[0], folder / "own.key"
    async with keys:
        file.write_text("two keys")
        file.write_text("k-new")
        await eventually(lambda: keys.of(pod) == Secret("k-new"))
        file.unlink()
        file.with_name("mark").write_text("k-newer")
        file.with_name("mark").rename(file)
        await eventually(lambda: keys.of(pod) == Secret("k-newer"))
