"""The JSON Schema of the config file, for editors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from matrixinfer.config import Config
from matrixinfer.scheduler.framework import Plugin

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def config_schema(plugins: Mapping[str, type[Plugin]]) -> dict[str, Any]:
    """The schema: every key with its description, its default and its bounds; the arguments of these plugins, too."""
    schema = msgspec.json.schema(Config, ref_template="#/$defs/{name}")
    definitions = schema["$defs"]
    enabled = definitions["PluginStage"]["properties"]["enabled"]
    enabled["items"] = {"anyOf": [{"type": "string"}, enabled["items"]]}
    definitions["PluginArgs"]["allOf"] = [_arguments(name, plugin, definitions) for name, plugin in plugins.items()]
    return {"$schema": DIALECT, "title": "MatrixInfer Gateway", **schema}


def _arguments(name: str, plugin: type[Plugin], definitions: dict[str, Any]) -> dict[str, Any]:
    """If an entry is for this plugin, its arguments are those that the plugin takes."""
    key = f"args of {name}"
    (args,), components = msgspec.json.schema_components([plugin.Args], ref_template=f"#/$defs/{key} {{name}}")
    definitions.update({f"{key} {each}": value for each, value in components.items()})
    own = args["$ref"].removeprefix("#/$defs/")
    properties = definitions[own].get("properties", {})
    if name == "kvcache-aware":  # aliases of keys of `blocks`
        blocks = definitions["BlocksConfig"]["properties"]
        properties.setdefault("blockSizeToHash", blocks["size"])
        properties.setdefault("hashScheme", blocks["scheme"])
    return {"if": {"properties": {"name": {"const": name}}}, "then": {"properties": {"args": args}}}
