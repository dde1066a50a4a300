"""The section `accessLog`: one line about each request."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from matrixinfer.config.base import Count, Section, Share, described
from matrixinfer.config.secrets import SecretPlace, place

STANDARD_OUTPUT = "-"


class AccessLogConfig(Section, frozen=True):
    """One line about each request, for people, for log collectors, and as a trace for `matrixinfer replay`."""

    path: Annotated[
        str,
        described(
            "File that lines are appended to, relative to the config file, in a folder that exists; or `-` for standard "
            "output. A file that was renamed or removed is made again; no signal is needed."
        ),
    ]
    format: Annotated[
        Literal["json", "text"],
        described("`json` writes one object per line, which `matrixinfer replay` reads; `text` is for people."),
    ] = "json"
    sample: Annotated[
        Share,
        described(
            "Share of the sessions whose requests are written; requests without a session are chosen one by one. Requests "
            "that fail are always written."
        ),
    ] = 1.0
    blocks: Annotated[
        bool,
        described(
            "Whether to write the hashes of each prompt's blocks, without which the log cannot be replayed. Nobody can read "
            "a prompt from them, but who has a prompt can see whether it was sent."
        ),
    ] = True
    max_blocks: Annotated[Count, described("Blocks of a prompt, from its start, whose hashes are written.")] = 8192
    key_file: Annotated[
        str | None,
        described(
            "File, relative to the config file, with a secret by which session ids are hashed, so that the lines of several "
            "gateways can be joined. By default each process draws its own."
        ),
    ] = None
    key_env: Annotated[str | None, described("Environment variable with that secret.")] = None

    def key_place(self) -> SecretPlace | None:
        """Where the secret is; None if there is none. Raises `ConfigError` if two places are named."""
        return place(self.key_file, self.key_env, "$.accessLog.key")

    def located(self, base: Path) -> AccessLogConfig:
        """With a path that starts from `base`."""
        path = self.path if self.path == STANDARD_OUTPUT else str((base / self.path).absolute())
        return msgspec.structs.replace(self, path=path)
