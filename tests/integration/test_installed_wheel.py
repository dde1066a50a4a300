"""The plugin of `docs/plugins.md` as its author has it: the wheel installed, the plugin in a package of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "plugins.md").read_text()
PLUGIN, SUITE = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
ENTRY_POINT, CONFIG = (re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.DOTALL)[0] for kind in ("toml", "yaml"))

PROJECT = f"""
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "my-package"
version = "1.0"

{ENTRY_POINT}
"""

SELECT = """
import sys
import matrixinfer

assert matrixinfer.__file__.startswith(sys.argv[1]), matrixinfer.__file__
args = [{"name": "rack", "args": {"prefix": "b-"}}]
config = {"pluginConfig": args, "plugins": {"Score": {"enabled": ["rack"]}}}
selector = matrixinfer.Selector(matrixinfer.Index(), config=config)
print(selector.select(range(300), ["a-1", "b-1"], model="m").chosen.name)
"""


class Author:
    """A folder with the installed wheels, and commands that see those first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.site = folder / "site"

    def install(self, source: Path) -> None:
        wheels = self.folder / source.name
        self.run("-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels), cwd=source)
        (wheel,) = wheels.glob("*.whl")
        pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps")
        self.run(*pip, "--target", str(self.site), str(wheel))

    def run(self, *arguments: str, cwd: Path | None = None) -> str:
        command = [sys.executable, *arguments]
        environment = os.environ | {"PYTHONPATH": str(self.site)}
        done = subprocess.run(
            command, cwd=cwd or self.folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def author(tmp_path_factory: pytest.TempPathFactory) -> Author:
    author = Author(tmp_path_factory.mktemp("author"))
    package = author.folder / "source" / "my_package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "rack.py").write_text(PLUGIN)
    (package.parent / "pyproject.toml").write_text(PROJECT)
    (author.folder / "test_rack.py").write_text(SUITE)
    (author.folder / "gateway.yaml").write_text(CONFIG)
    author.install(ROOT)
    author.install(package.parent)
    return author


def test_the_plugin_passes_the_suite_under_pytest(author: Author) -> None:
    said = author.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_rack.py")
    assert re.search(r"^7 passed", said, flags=re.MULTILINE), said


def test_the_plugin_passes_the_suite_without_pytest(author: Author) -> None:
    suite = "import sys, test_rack; test_rack.TestRack().run(); print('pytest' in sys.modules)"
    assert author.run("-c", suite) == "False\n"


def test_the_gateway_finds_the_plugin_and_its_arguments(author: Author) -> None:
    assert "gateway.yaml: valid" in author.run("-m", "matrixinfer", "config", "check", "gateway.yaml")


def test_the_library_finds_the_plugin(author: Author) -> None:
    assert author.run("-c", SELECT, str(author.site)) == "b-1\n"


def test_the_wheel_brings_the_files_of_the_dashboard(author: Author) -> None:
    static = Path("matrixinfer") / "dashboard" / "static"
    installed = {path.name for path in (author.site / static).iterdir()}
    assert installed == {path.name for path in (ROOT / "src" / static).iterdir()}
