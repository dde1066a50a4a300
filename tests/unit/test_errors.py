import inspect
import re

import pytest

from matrixinfer import errors
from matrixinfer.errors import ConfigError, InvalidRequest, MatrixInferError


def test_the_documented_tree_is_the_real_one() -> None:
    drawn: dict[str, str] = {}
    branch = [""] * 9
    for indent, name in re.findall(r"^([│├└─ ]*)(\w+)(?: {2,}|$)", errors.__doc__ or "", re.MULTILINE):
        depth = len(indent) // 4
        branch[depth] = name
        drawn[name] = branch[depth - 1] if depth else "Exception"
    classes = inspect.getmembers(errors, inspect.isclass)
    assert drawn == {name: kind.__mro__[1].__name__ for name, kind in classes}


def test_a_configuration_error_shows_its_path() -> None:
    error = ConfigError("$.pods[0].url", "expected a URL")
    assert str(error) == "$.pods[0].url: expected a URL"


def test_a_request_error_may_name_the_field() -> None:
    with pytest.raises(MatrixInferError, match="must be a string") as caught:
        raise InvalidRequest("must be a string", param="model")
    assert isinstance(caught.value, InvalidRequest)
    assert caught.value.param == "model"
    assert InvalidRequest("malformed").param is None
