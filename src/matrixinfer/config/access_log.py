"""The section `accessLog`: one line about each request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from matrixinfer.config.base import Count, Section, Share, described


class AccessLogConfig(Section, frozen=True):
    """One line about each request, for people, for log collectors, and as a trace for `matrixinfer replay`."""

    path: Annotated[
        str,
        described(
            "File that lines are appended to, in a folder that exists, or `-` for standard output. A file that was renamed "
            "or removed is made again; no signal is needed."
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
    key: Annotated[
        str | None,
        described(
            "Secret with which session ids are hashed, so that the lines of several gateways can be joined. Never shown. By "
            "default each process draws its own."
        ),
    ] = None

    def __repr__(self) -> str:
        """Show no key."""
        return f"AccessLogConfig(path={self.path!r}, format={self.format!r}, sample={self.sample})"

    def __rich_repr__(self) -> Iterator[tuple[str, object]]:  # type: ignore[override]  # pairs are all that Rich needs
        """Show no key."""
        yield from (("path", self.path), ("format", self.format), ("sample", self.sample))
