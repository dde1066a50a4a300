"""The API keys that engines require (`--api-key`): which settings name them, and which pod gets which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from matrixinfer.config.base import Section, described
from matrixinfer.config.secrets import SecretPlace, place

if TYPE_CHECKING:
    from matrixinfer.config.schema import Config


class EngineKeysConfig(Section, frozen=True):
    """The API key of engines whose pod and model name none, and which requests carry engines' keys."""

    api_key_file: Annotated[
        str | None, described("File with the key, relative to the config file. It is read again when it changes.")
    ] = None
    api_key_env: Annotated[str | None, described("Environment variable with the key.")] = None
    send: Annotated[
        Literal["authenticated", "always"],
        described(
            "The gateway's own questions always carry the engine's key. `authenticated`: so do requests of clients that "
            "`access` has authenticated; without `access`, engines get what the client sent. `always`: every request "
            "carries it in place of the client's `Authorization`, so whoever reaches the gateway may use the engines."
        ),
    ] = "authenticated"


def key_places(config: Config) -> tuple[SecretPlace, ...]:
    """Every place of a key that the configuration names. Raises `ConfigError` if a setting contradicts another."""
    named = (
        *(place(pod.api_key_file, pod.api_key_env, f"$.pods[{i}].apiKey") for i, pod in enumerate(config.pods)),
        *(
            place(model.api_key_file, model.api_key_env, f"$.models[{i}].apiKey")
            for i, model in enumerate(config.models)
        ),
        place(config.engine_keys.api_key_file, config.engine_keys.api_key_env, "$.engineKeys.apiKey"),
    )
    return tuple(each for each in named if each is not None)
