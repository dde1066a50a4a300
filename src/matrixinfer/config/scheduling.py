"""The sections `blocks` and `scheduler`: how prompts are cut into blocks, and how a pod is chosen."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from matrixinfer.config.base import Count, Seconds, Section, Share, described


class BlocksConfig(Section, frozen=True):
    """How prompts and caches are cut into blocks. Every process that shares an index needs the same values."""

    size: Annotated[
        Count,
        described(
            "Tokens per block. Any size works with any block size of the engines; a prompt shorter than one block "
            "cannot be matched."
        ),
    ] = 128
    scheme: Annotated[
        Literal["prefix", "block"],
        described(
            "`prefix` hashes a block together with everything before it. `block` hashes each block alone, as existing "
            "MatrixInfer and kthena writers do; its matches are only hints."
        ),
    ] = "prefix"


class PluginRef(Section, frozen=True):
    """An enabled plugin and its weight. Only scorers use the weight."""

    name: Annotated[str, described("The plugin's name.")]
    weight: Annotated[float, Meta(ge=0), described("The plugin's scores are multiplied by this in the total.")] = 1.0


class PluginStage(Section, frozen=True):
    """The plugins of one stage."""

    enabled: Annotated[
        tuple[PluginRef, ...],
        described("Plugins in the order in which they run. A name alone stands for `{name: NAME, weight: 1}`."),
    ] = ()


class PluginsConfig(Section, frozen=True, rename="pascal"):
    """Which plugins run at which stage."""

    filter: Annotated[PluginStage, described("Remove pods that must not get the request.")] = PluginStage(
        enabled=(PluginRef(name="least-request"), PluginRef(name="expected-ttft"))
    )
    score: Annotated[
        PluginStage, described("Rate each remaining pod from 0 to 100. The weighted sum of the scores ranks the pods.")
    ] = PluginStage(enabled=(PluginRef(name="expected-ttft"), PluginRef(name="session-affinity", weight=0.004)))
    picker: Annotated[PluginStage, described("Exactly one plugin, which turns the sums into a ranking.")] = PluginStage(
        enabled=(PluginRef(name="max-score"),)
    )
    post_schedule: Annotated[PluginStage, described("See each decision after it is made.")] = PluginStage()


class PluginArgs(Section, frozen=True):
    """Arguments of one plugin."""

    name: Annotated[str, described("The plugin's name.")]
    args: Annotated[
        dict[str, Any],
        described("Its arguments; see the plugin's own table. Arguments that are not given keep their defaults."),
    ] = msgspec.field(default_factory=dict)


class WeightsConfig(Section, frozen=True):
    """The credit for cached blocks that count less than 1, the credit for a block in the device's memory."""

    host: Annotated[Share, described("A block that is off-loaded to the host's memory.")] = 0.8
    storage: Annotated[Share, described("A block that is off-loaded further: to disk, or to another machine.")] = 0.5
    unproven: Annotated[
        Share,
        described(
            "A block that is indexed while the pod's events are in doubt, or that is not indexed but was sent to the pod "
            "lately."
        ),
    ] = 0.75


class SchedulerConfig(Section, frozen=True):
    """How a pod is chosen."""

    plugin_config: Annotated[
        tuple[PluginArgs, ...],
        described(
            "Arguments of plugins, by name. An entry changes only the arguments that it gives; all others keep the "
            "defaults of the plugins' tables below."
        ),
    ] = (
        PluginArgs(name="kvcache-aware", args={"maxBlocksToMatch": 0}),
        PluginArgs(name="bounded-load", args={"minInFlight": 6}),
    )
    plugins: Annotated[PluginsConfig, described("The profile: which plugins run, and their weights.")] = PluginsConfig()
    slow_plugin_seconds: Annotated[
        Seconds,
        described(
            "A plugin that takes longer for one call is named in the log and counted in "
            "`matrixinfer_plugin_slow_total`. Its answer still counts."
        ),
    ] = 0.05
    max_prefix_tokens: Annotated[
        Count, described("At most this many tokens of a prompt, from its start, are hashed and looked up.")
    ] = 1_000_000
    pending_seconds: Annotated[
        Annotated[float, Meta(ge=0)],
        described(
            "How long a finished request's prompt counts as cached at its pod before the pod's events confirm it."
        ),
    ] = 2.0
    weights: Annotated[WeightsConfig, described("Credit for blocks that are off-loaded or in doubt.")] = WeightsConfig()
    decisions_kept: Annotated[
        Annotated[int, Meta(ge=0)],
        described(
            "How many decisions are kept for `/debug/decisions` and `matrixinfer explain`. Each takes about 5 kB and holds "
            "no prompt."
        ),
    ] = 1000
    seed: Annotated[int, described("Seed of the random generator that breaks ties.")] = 0
