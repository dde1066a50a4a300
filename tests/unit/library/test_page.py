"""`docs/library.md` shows code that runs, and what it prints."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

from matrixinfer import Index, Selector, errors

PAGE = (Path(__file__).parents[3] / "docs" / "library.md").read_text()
EXAMPLE, RECEIVER, CONFIGURED = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_example_prints_what_the_page_shows() -> None:
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE, flags=re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(EXAMPLE, {})  # noqa: S102 - our own documentation
    assert printed.getvalue() == shown


def test_the_configured_selector_is_accepted() -> None:
    exec(CONFIGURED, {"Selector": Selector, "index": Index()})  # noqa: S102


def test_every_error_of_the_page_is_one() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE[PAGE.index("## Errors") : PAGE.index("## Threads")], flags=re.MULTILINE)
    assert len(rows) == 4
    for name in rows:
        assert issubclass(getattr(errors, name), errors.MatrixInferError)


def test_defaults_that_the_page_names_are_those_of_the_code() -> None:
    for name, value in re.findall(r"`Index\((max_\w+)=([\d_]+)\)`", PAGE):
        assert (Index.__init__.__kwdefaults__ or {})[name] == int(value)
