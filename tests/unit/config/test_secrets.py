from __future__ import annotations

from pathlib import Path

import pytest

from matrixinfer.config.secrets import MAX_BYTES, Secret, SecretPlace, place
from matrixinfer.errors import ConfigError


def test_a_secret_is_shown_nowhere() -> None:
    secret = Secret("sk-1")
    assert secret.reveal() == "sk-1"
    assert "sk-1" not in f"{secret} {secret!r} {[secret]}"
    assert secret == Secret("sk-1") != Secret("sk-2")


def test_a_key_comes_from_a_file_or_from_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("sk-1\n")
    assert SecretPlace(str(file), None, "$.a").read() == Secret("sk-1")
    assert SecretPlace(None, "KEY", "$.a").read({"KEY": " sk-2 "}) == Secret("sk-2")


@pytest.mark.parametrize("content", [b"", b"sk 1", b"sk-1\nsk-2", b"sk-\xff", b"k" * (MAX_BYTES + 1)])
def test_what_is_no_key_is_refused_and_not_shown(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        SecretPlace(str(file), None, "$.pods[0].apiKey").read()
    assert caught.value.path == "$.pods[0].apiKeyFile"
    assert "sk" not in str(caught.value).removeprefix("$.pods[0].apiKeyFile").replace("disk", "")


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"\$\.a\.apiKeyEnv: .*`NO_SUCH_KEY`"):
        SecretPlace(None, "NO_SUCH_KEY", "$.a.apiKey").read({})
    with pytest.raises(ConfigError, match=r"--engine-api-key-file: cannot read /no/such"):
        SecretPlace("/no/such", None, "--engine-api-key").read()


def test_one_place_is_enough() -> None:
    assert place(None, None, "$.a") is None
    with pytest.raises(ConfigError, match="expected either this or"):
        place("file", "ENV", "$.a.apiKey")
