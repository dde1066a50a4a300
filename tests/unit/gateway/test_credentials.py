from __future__ import annotations

import pytest
from multidict import CIMultiDict

from matrixinfer.config.secrets import Secret
from matrixinfer.gateway.credentials import Credentials

KEYS = {"http://a": Secret("engine-key")}
SENT = [("Authorization", "Bearer mine"), ("X-Api-Key", "mine"), ("api-key", "mine"), ("Cookie", "id=mine"), ("x", "y")]


def sent(url: str, *, always: bool = False, is_authenticated: bool = False) -> dict[str, str]:
    headers = CIMultiDict(SENT)
    Credentials(KEYS.get, always=always).apply(headers, url, is_authenticated=is_authenticated)
    return {name.lower(): value for name, value in headers.items()}


UNCHANGED = {name.lower(): value for name, value in SENT}
WITH_KEY = {"x": "y", "authorization": "Bearer engine-key"}


@pytest.mark.parametrize("url", ["http://a", "http://b"])
def test_without_a_caller_the_engine_gets_what_the_client_sent(url: str) -> None:
    assert sent(url) == UNCHANGED


def test_a_caller_s_credentials_are_replaced_by_the_engine_s_key() -> None:
    assert sent("http://a", is_authenticated=True) == WITH_KEY
    assert sent("http://b", is_authenticated=True) == {"x": "y"}


def test_always_means_for_every_client_of_an_engine_that_has_a_key() -> None:
    assert sent("http://a", always=True) == WITH_KEY
    assert sent("http://b", always=True) == UNCHANGED
