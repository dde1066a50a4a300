"""Settings that can be written in more than one way have one form once they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from matrixinfer.config import (
    BlocksConfig,
    Config,
    PluginArgs,
    PluginRef,
    SchedulerConfig,
    checked,
    convert,
    parse,
)
from matrixinfer.errors import ConfigError


def parsed(**document: Any) -> Config:
    return parse(yaml.safe_dump(document), base=Path("/"))


def with_arguments(*entries: tuple[str, dict[str, Any]], **document: Any) -> Config:
    entry_list = [{"name": name, "args": args} for name, args in entries]
    return parsed(scheduler={"pluginConfig": entry_list}, **document)


def arguments(config: Config) -> dict[str, dict[str, Any]]:
    return {entry.name: entry.args for entry in config.scheduler.plugin_config}


# Enabled plugins


def test_a_plugin_enabled_by_its_name_alone_has_the_weight_1() -> None:
    config = parsed(scheduler={"plugins": {"Score": {"enabled": ["a", {"name": "b", "weight": 2}]}}})
    assert config.scheduler.plugins.score.enabled == (PluginRef(name="a", weight=1.0), PluginRef(name="b", weight=2.0))


@pytest.mark.parametrize("entry", [5, None, ["a"]])
def test_an_entry_that_is_neither_a_name_nor_a_mapping_is_refused(entry: object) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(scheduler={"plugins": {"Filter": {"enabled": ["a", entry]}}})
    assert caught.value.path == "$.scheduler.plugins.Filter.enabled[1]"
    assert caught.value.message.startswith("expected a plugin's name or `{name, weight}`, got ")


@pytest.mark.parametrize(
    ("scheduler", "path"),
    [
        ([], "$.scheduler"),
        ({"plugins": []}, "$.scheduler.plugins"),
        ({"plugins": {"Score": []}}, "$.scheduler.plugins.Score"),
        ({"plugins": {"Score": {"enabled": "a"}}}, "$.scheduler.plugins.Score.enabled"),
    ],
)
def test_sections_of_another_shape_are_left_for_the_schema_to_refuse(scheduler: object, path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(scheduler=scheduler)
    assert caught.value.path == path


# Arguments of plugins


def test_naming_one_plugin_leaves_the_arguments_of_the_others_as_shipped() -> None:
    config = with_arguments(("bounded-load", {"factor": 1.5}))
    assert arguments(config) == {
        "bounded-load": {"factor": 1.5, "minInFlight": 6},
        "kvcache-aware": {"maxBlocksToMatch": 0},
    }


def test_naming_one_argument_leaves_the_others_as_shipped() -> None:
    config = with_arguments(("kvcache-aware", {"blockSizeToHash": 16}), ("mine", {"x": 1}))
    assert arguments(config) == {
        "kvcache-aware": {"maxBlocksToMatch": 0},
        "mine": {"x": 1},
        "bounded-load": {"minInFlight": 6},
    }


def test_a_given_argument_replaces_the_shipped_one() -> None:
    config = with_arguments(("kvcache-aware", {"maxBlocksToMatch": 128}), ("bounded-load", {}))
    assert arguments(config) == {"kvcache-aware": {"maxBlocksToMatch": 128}, "bounded-load": {"minInFlight": 6}}


def test_entries_keep_their_places_so_that_errors_name_the_right_one() -> None:
    config = with_arguments(("mine", {}), ("bounded-load", {}))
    assert list(arguments(config)) == ["mine", "bounded-load", "kvcache-aware"]


def test_an_empty_list_changes_nothing() -> None:
    assert with_arguments().scheduler == SchedulerConfig()


def test_a_plugin_with_two_entries_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        with_arguments(("a", {}), ("b", {}), ("a", {}))
    assert caught.value.path == "$.scheduler.pluginConfig[2].name"
    assert "all its arguments in one entry" in caught.value.message


# Blocks


def test_blocks_have_defaults() -> None:
    assert parsed().blocks == BlocksConfig(size=128, scheme="prefix")


def test_blocks_are_set_at_the_top_level() -> None:
    assert parsed(blocks={"size": 16, "scheme": "block"}).blocks == BlocksConfig(size=16, scheme="block")


@pytest.mark.parametrize("size", [16, 128])
def test_an_alias_alone_sets_its_value(size: int) -> None:
    assert with_arguments(("kvcache-aware", {"blockSizeToHash": size})).blocks == BlocksConfig(size=size)
    assert with_arguments(("kvcache-aware", {"hashScheme": "block"})).blocks == BlocksConfig(scheme="block")


def test_an_alias_completes_the_other_key() -> None:
    config = with_arguments(("kvcache-aware", {"hashScheme": "block"}), blocks={"size": 16})
    assert config.blocks == BlocksConfig(size=16, scheme="block")


def test_an_alias_may_repeat_its_key_or_be_null() -> None:
    config = with_arguments(("kvcache-aware", {"blockSizeToHash": 16, "hashScheme": None}), blocks={"size": 16})
    assert config.blocks == BlocksConfig(size=16)


@pytest.mark.parametrize("size", [16, 128])
def test_an_alias_that_contradicts_its_key_is_refused_also_where_that_has_its_default(size: int) -> None:
    with pytest.raises(ConfigError) as caught:
        with_arguments(("other", {}), ("kvcache-aware", {"blockSizeToHash": 32}), blocks={"size": size})
    assert caught.value.path == "$.scheduler.pluginConfig[1].args.blockSizeToHash"
    assert caught.value.message == (
        f"`32` contradicts `{size}` at `$.blocks.size`, and `blockSizeToHash` is an alias of that key: "
        "remove `blockSizeToHash`, or give both the same value"
    )


def test_schemes_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        with_arguments(("kvcache-aware", {"hashScheme": "block"}), blocks={"scheme": "prefix"})
    assert caught.value.path == "$.scheduler.pluginConfig[0].args.hashScheme"
    assert "`block` contradicts `prefix` at `$.blocks.scheme`" in caught.value.message


@pytest.mark.parametrize(
    ("args", "path", "words"),
    [
        ({"blockSizeToHash": 0}, "$.scheduler.pluginConfig[0].args.blockSizeToHash", ">= 1"),
        ({"blockSizeToHash": "x"}, "$.scheduler.pluginConfig[0].args.blockSizeToHash", "a whole number or null"),
        ({"hashScheme": "blok"}, "$.scheduler.pluginConfig[0].args.hashScheme", "did you mean `block`?"),
    ],
)
def test_a_bad_alias_is_refused_at_its_own_path(args: dict[str, Any], path: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_arguments(("kvcache-aware", args))
    assert caught.value.path == path
    assert words in caught.value.message


def test_aliases_are_taken_from_a_configuration_made_in_code() -> None:
    scheduler = SchedulerConfig(plugin_config=(PluginArgs(name="kvcache-aware", args={"blockSizeToHash": 16}),))
    assert checked(Config(scheduler=scheduler)).blocks.size == 16
    with pytest.raises(ConfigError, match="`16` contradicts `32`"):
        checked(Config(scheduler=scheduler, blocks=BlocksConfig(size=32)))


def test_what_is_loaded_may_be_checked_again_and_written_out_and_read() -> None:
    config = with_arguments(("kvcache-aware", {"blockSizeToHash": 16}), ("bounded-load", {"factor": 2.0}))
    assert checked(config) == config
    assert checked(convert(msgspec.to_builtins(config), Config, path="$")) == config
