import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.pretty import pretty_repr

from matrixinfer.config import Config, KvEventsConfig, PluginRef, Section, convert, load, parse, split_address
from matrixinfer.errors import ConfigError

HERE = Path("/etc/matrixinfer")

EXAMPLE = """
listen: 127.0.0.1:8080
admin: 127.0.0.1:8081
models: [{name: tiny, aliases: [tiny-latest], tokenizer: ./tiny}]
pods:
  - {name: pod-a.default, url: "http://127.0.0.1:8001", kvEvents: {endpoint: "tcp://127.0.0.1:5557", replayEndpoint: "tcp://127.0.0.1:5558"}}
index: {kind: memory}
scheduler:
  pluginConfig: [{name: kvcache-aware, args: {blockSizeToHash: 128, maxBlocksToMatch: 128}}]
  plugins:
    Filter: {enabled: [least-request, bounded-load]}
    Score: {enabled: [{name: kvcache-aware, weight: 2}, {name: least-request, weight: 1}]}
"""


def parsed(text: str) -> Config:
    return parse(textwrap.dedent(text), base=HERE)


def refusal(text: str) -> tuple[str, str]:
    """The path and message with which a document is refused."""
    with pytest.raises(ConfigError) as caught:
        parsed(text)
    assert str(caught.value) == f"{caught.value.path}: {caught.value.message}"
    return caught.value.path, caught.value.message


def test_an_example_of_every_common_section_parses() -> None:
    config = parsed(EXAMPLE)
    assert (config.listen, config.admin) == ("127.0.0.1:8080", "127.0.0.1:8081")
    (model,) = config.models
    assert (model.name, model.aliases) == ("tiny", ("tiny-latest",))
    (pod,) = config.pods
    assert (pod.name, pod.url) == ("pod-a.default", "http://127.0.0.1:8001")
    assert pod.kv_events == KvEventsConfig(endpoint="tcp://127.0.0.1:5557", replay_endpoint="tcp://127.0.0.1:5558")
    assert config.blocks.size == 128
    arguments = config.scheduler.plugin_config[0]
    assert (arguments.name, arguments.args) == ("kvcache-aware", {"maxBlocksToMatch": 128})
    filters = (PluginRef(name="least-request"), PluginRef(name="bounded-load"))
    assert config.scheduler.plugins.filter.enabled == filters
    scorers = (PluginRef(name="kvcache-aware", weight=2.0), PluginRef(name="least-request", weight=1.0))
    assert config.scheduler.plugins.score.enabled == scorers


def test_an_empty_document_is_the_default_configuration() -> None:
    assert parsed("") == parsed("{}") == Config()


def test_the_admin_address_can_be_turned_off() -> None:
    assert parsed("admin: null").admin is None


def test_a_section_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Config().listen = "127.0.0.1:1"  # type: ignore[misc]  # the test is that it cannot


@pytest.mark.parametrize("events", ["discover", "none"])
def test_kv_events_may_be_a_word(events: str) -> None:
    (pod,) = parsed(f"pods: [{{name: a, url: 'http://a', kvEvents: {events}}}]").pods
    assert pod.kv_events == events


@pytest.mark.parametrize("endpoint", ["tcp://10.0.0.1:5557", "tcp://[::1]:5557", "ipc:///run/kv", "inproc://kv"])
def test_endpoints_of_every_transport_are_accepted(endpoint: str) -> None:
    (pod,) = parsed(f"pods: [{{name: a, url: 'https://a/prefix', kvEvents: {{endpoint: '{endpoint}'}}}}]").pods
    assert pod.kv_events == KvEventsConfig(endpoint=endpoint)


# Paths


def test_relative_paths_start_from_the_folder_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("models: [{name: a, tokenizer: ./tiny, chatTemplate: ../chat.jinja}, {name: b, tokenizer: /abs}]")
    first, second = load(file).models
    assert first.tokenizer == str(tmp_path.resolve() / "tiny")
    assert first.chat_template == str(tmp_path.resolve().parent / "chat.jinja")
    assert (second.tokenizer, second.chat_template) == (str(Path("/abs").resolve()), None)


def test_the_built_in_template_is_a_name_not_a_path() -> None:
    assert parsed("models: [{name: a, chatTemplate: chatml}]").models[0].chat_template == "chatml"


# Refusals


@pytest.mark.parametrize(
    ("text", "path", "key"),
    [
        ("listenn: x", "$.listenn", "listen"),
        ("pods: [{name: a, uri: x}]", "$.pods[0].uri", "url"),
        ("models: [{name: a}, {name: b, alias: [c]}]", "$.models[1].alias", "aliases"),
        ("index: {max_blocks: 5}", "$.index.max_blocks", "maxBlocks"),
        ("scheduler: {plugins: {Scores: {}}}", "$.scheduler.plugins.Scores", "Score"),
        ("scheduler: {plugins: {score: {}}}", "$.scheduler.plugins.score", "Score"),
        ("scheduler: {plugins: {Score: {enable: []}}}", "$.scheduler.plugins.Score.enable", "enabled"),
        (
            "scheduler: {plugins: {Score: {enabled: [a, {name: b, wieght: 2}]}}}",
            "$.scheduler.plugins.Score.enabled[1].wieght",
            "weight",
        ),
        ("scheduler: {pluginConfig: [{name: a, arg: {}}]}", "$.scheduler.pluginConfig[0].arg", "args"),
        (
            "pods: [{name: a, url: 'http://a', kvEvents: {endpoint: x, replayEndpont: y}}]",
            "$.pods[0].kvEvents.replayEndpont",
            "replayEndpoint",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_its_path_and_the_nearest_valid_one(text: str, path: str, key: str) -> None:
    assert refusal(text) == (path, f"unknown key; did you mean `{key}`?")


def test_an_unknown_key_that_resembles_none_is_refused_with_all_valid_ones() -> None:
    assert refusal("log: {zzz: 1}") == ("$.log.zzz", "unknown key; expected one of level, format")


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("index: {kind: redes}", "$.index.kind", "unknown value `redes`; did you mean `redis`?"),
        ("index: {kind: memoir}", "$.index.kind", "unknown value `memoir`; did you mean `memory`?"),
        ("log: {level: warn}", "$.log.level", "unknown value `warn`; did you mean `warning`?"),
        (
            "pods: [{name: a, url: 'http://a', kvEvents: discovery}]",
            "$.pods[0].kvEvents",
            "unknown value `discovery`; did you mean `discover`?",
        ),
    ],
)
def test_an_unknown_value_is_refused_with_the_valid_ones(text: str, path: str, message: str) -> None:
    assert refusal(text) == (path, message)


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("- listen", "$", "expected a mapping, got list"),
        ("listen: 8080", "$.listen", "expected a string such as 127.0.0.1:8080, got int"),
        ("listen: null", "$.listen", "got null"),
        ("pods: {name: a}", "$.pods", "expected a list, got mapping"),
        ("models: [{name: a, aliases: b}]", "$.models[0].aliases", "expected a list, got str"),
        ("models: [{aliases: [b]}]", "$.models[0]", "required key `name`"),
        ("pods: [{name: a}]", "$.pods[0]", "required key `url`"),
        ("pods: [{name: a, url: 'http://a', kvEvents: {}}]", "$.pods[0].kvEvents", "required key `endpoint`"),
        ("1: 2", "$", "as a key"),
        ("models: [{1: 2}]", "$.models[0]", "as a key"),
        ("index: {maxBlocks: 0}", "$.index.maxBlocks", ">= 1"),
        ("index: {maxBlocks: many}", "$.index.maxBlocks", "expected a whole number, got str"),
        ("index: {maxBlocks: yes}", "$.index.maxBlocks", "expected a whole number, got bool"),
        ("limits: {requestTimeoutSeconds: 0}", "$.limits.requestTimeoutSeconds", "> 0"),
        ("drain: {timeoutSeconds: -1}", "$.drain.timeoutSeconds", ">= 0"),
        ("tokenization: {timeoutSeconds: -0.5}", "$.tokenization.timeoutSeconds", "> 0"),
        ("podWatch: {unhealthyAfterFailures: 0}", "$.podWatch.unhealthyAfterFailures", ">= 1"),
        (
            "scheduler: {plugins: {Score: {enabled: [{name: a, weight: -1}]}}}",
            "$.scheduler.plugins.Score.enabled[0].weight",
            ">= 0",
        ),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_with_its_path(text: str, path: str, expected: str) -> None:
    where, message = refusal(text)
    assert where == path
    assert expected in message


@pytest.mark.parametrize("address", ["8080", "localhost", ":8080", "a:b", "a:-1", "a:65536", "a:", "a:²", "a: 1"])
@pytest.mark.parametrize("key", ["listen", "admin"])
def test_an_address_is_a_host_and_a_port(key: str, address: str) -> None:
    assert refusal(f"{key}: '{address}'") == (f"$.{key}", f"expected `host:port`, got `{address}`")


@pytest.mark.parametrize(
    ("address", "pair"),
    [("127.0.0.1:0", ("127.0.0.1", 0)), ("[::1]:65535", ("::1", 65535)), ("localhost:8080", ("localhost", 8080))],
)
def test_an_address_is_split(address: str, pair: tuple[str, int]) -> None:
    assert split_address(address, path="$") == pair


@pytest.mark.parametrize(
    "models", ["[{name: a}, {name: a}]", "[{name: a}, {name: b, aliases: [a]}]", "[{name: b, aliases: [a]}, {name: a}]"]
)
def test_models_and_aliases_have_different_names(models: str) -> None:
    assert refusal(f"models: {models}") == ("$.models[1]", "the name `a` is already taken by $.models[0]")


def test_pods_have_different_names() -> None:
    text = "pods: [{name: a, url: 'http://a'}, {name: b, url: 'http://b'}, {name: a, url: 'http://c'}]"
    assert refusal(text) == ("$.pods[2].name", "the name `a` is already taken by $.pods[0]")


@pytest.mark.parametrize(("url", "kept"), [("http://a:1/", "http://a:1"), ("http://a/x//", "http://a/x")])
def test_a_trailing_slash_of_a_pods_url_is_dropped(url: str, kept: str) -> None:
    (pod,) = parsed(f"pods: [{{name: a, url: '{url}'}}]").pods
    assert pod.url == kept


@pytest.mark.parametrize("url", ["http://a:1/v1", "http://a:1/v1/"])
def test_a_pods_url_with_the_version_is_refused_with_a_hint(url: str) -> None:
    path, message = refusal(f"pods: [{{name: a, url: '{url}'}}]")
    assert (path, message.endswith("did you mean `http://a:1`?")) == ("$.pods[0].url", True)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8001",
        "tcp://a:1",
        "http://",
        "ftp://a",
        "http://a:x",
        "http://a:99999",
        "http://[::1",
        "http://a?b",
        "http://a b",
    ],
)
def test_a_pods_url_is_http(url: str) -> None:
    path, message = refusal(f"pods: [{{name: a, url: '{url}'}}]")
    assert (path, url in message) == ("$.pods[0].url", True)


@pytest.mark.parametrize("key", ["endpoint", "replayEndpoint"])
@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:5557", "tcp://host", "http://host:1", "tcp://host:5557x", "tcp://*:5557"]
)
def test_an_event_endpoint_names_its_transport_and_port(key: str, endpoint: str) -> None:
    endpoints = {"endpoint": "tcp://a:1", key: endpoint}
    path, message = refusal(
        f"pods: [{{name: a, url: 'http://a', kvEvents: {msgspec.json.encode(endpoints).decode()}}}]"
    )
    assert (path, endpoint in message) == (f"$.pods[0].kvEvents.{key}", True)


@pytest.mark.parametrize("text", ["a: [", "a: b: c", "\x00", "{a: 2024-13-45}", "a: !!python/object:os.system {}"])
def test_text_that_is_not_yaml_is_refused(text: str) -> None:
    path, message = refusal(text)
    assert path == "$"
    assert message.startswith("not valid YAML")


def test_yaml_nested_beyond_reason_is_refused() -> None:
    assert refusal("x: " + "[" * 5000)[0] == "$"


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot read .*config\.yaml"):
        load(file)


# Sections of a configuration


class Arguments(Section, frozen=True):
    block_size_to_hash: int = 128
    by_name: Mapping[str, PluginRef] | None = None


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ({"blockSize": 1}, "$.args.blockSize"),
        ({"blockSizeToHash": "x"}, "$.args.blockSizeToHash"),
        ({"byName": {"a": {"name": "a", "wait": 1}}}, "$.args.byName[...].wait"),
    ],
)
def test_data_of_one_section_is_refused_with_the_path_of_that_section(data: Any, path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        convert(data, Arguments, path="$.args")
    assert caught.value.path == path


def test_data_of_one_section_is_converted() -> None:
    assert convert({"blockSizeToHash": 16}, Arguments, path="$") == Arguments(block_size_to_hash=16)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="duplicate key `pods`"):
        parse("pods: []\nlisten: 'a:1'\npods: []\n", base=tmp_path)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("index: {kind: redis, warmStart: true}", "$.index.warmStart"),
        ("index: {writer: none}", "$.index.writer"),
        ("index: {leaseSeconds: 20, maxAgeSeconds: 10}", "$.index.leaseSeconds"),
        ("redis: {cluster: true, db: 1}", "$.redis.db"),
        ("redis: {cluster: true, socket: /run/redis}", "$.redis"),
        ("redis: {sentinels: [here]}", "$.redis.sentinels[0]"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(text: str, path: str) -> None:
    assert refusal(text)[0] == path


def test_no_representation_shows_a_password() -> None:
    config = parse("redis: {password: hunter2, sentinelPassword: hunter3}", base=Path())
    assert "hunter" not in repr(config) + pretty_repr(config)


def test_a_model_may_have_a_name_of_its_own_in_redis() -> None:
    (model,) = parsed("models: [{name: engine, aliases: [booster], indexName: booster}]").models
    assert model.index_name == "booster"
    assert refusal("models: [{name: a}, {name: b, indexName: a}]") == (
        "$.models[1].indexName",
        "expected a name of its own in Redis, but `a` is that of $.models[0]",
    )
    assert refusal("models: [{name: a, indexName: b}, {name: b}]")[0] == "$.models[1].name"
    assert refusal("models: [{name: a, indexName: ''}]") == (
        "$.models[0].indexName",
        "expected a name, got an empty one",
    )
