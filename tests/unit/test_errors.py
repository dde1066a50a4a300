import importlib
import inspect
import pkgutil
import re

import pytest

import matrixinfer
from matrixinfer import errors
from matrixinfer.errors import ConfigError, InvalidRequest, MatrixInferError, client_error


def drawn() -> dict[str, tuple[str, str]]:
    """Name to parent and module, as the docstring of `errors` draws them."""
    found: dict[str, tuple[str, str]] = {}
    branch = [""] * 9
    for indent, library, name, module in re.findall(
        r"^([│├└─ ]*)(\w+\.)?(\w+)(?: {2,}(?:([a-z_.]+):)?.*)?$", errors.__doc__ or "", re.MULTILINE
    ):
        depth = len(indent) // 4
        branch[depth] = name
        if not library:
            parent = branch[depth - 1] if depth else "Exception"
            found.setdefault(name, (parent, f"matrixinfer.{module or 'errors'}"))
    return found


def test_the_drawn_tree_lists_every_public_exception_of_the_package() -> None:
    defined: dict[str, tuple[str, str]] = {}
    for module in pkgutil.walk_packages(matrixinfer.__path__, "matrixinfer."):
        if module.name == "matrixinfer.__main__":
            continue
        for name, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(kind, BaseException) and kind.__module__ == module.name and not name.startswith("_"):
                assert name not in defined, f"two exceptions are named {name}"
                defined[name] = (kind.__mro__[1].__name__, module.name)
    assert drawn() == defined


def test_a_configuration_error_shows_its_path() -> None:
    error = ConfigError("$.pods[0].url", "expected a URL")
    assert str(error) == "$.pods[0].url: expected a URL"


def test_a_request_error_may_name_the_field() -> None:
    with pytest.raises(MatrixInferError, match="must be a string") as caught:
        raise InvalidRequest("must be a string", param="model")
    assert isinstance(caught.value, InvalidRequest)
    assert caught.value.param == "model"
    assert InvalidRequest("malformed").param is None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(
                "Cannot connect to host a:1 ssl:<ssl.SSLContext object at 0x7f> [[SSL: WRONG_VERSION_NUMBER] wrong]"
            ),
            "Cannot connect to host a:1 [[SSL: WRONG_VERSION_NUMBER] wrong]: does it speak plain HTTP?",
        ),
        (OSError("Cannot connect to host a:1 ssl:default [refused]"), "Cannot connect to host a:1 [refused]"),
        (OSError("reset"), "reset"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_an_error_of_the_http_client_does_not_name_tls_where_there_is_none(error: Exception, words: str) -> None:
    assert client_error(error) == words
