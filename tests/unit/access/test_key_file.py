from __future__ import annotations

import pytest

from matrixinfer.access.key_file import KeyRing, hash_of, new_key, parse_keys
from matrixinfer.config.access import QuotaConfig
from matrixinfer.errors import ConfigError

DEFAULT = QuotaConfig(requests=5)


def test_new_keys_are_long_and_never_the_same() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("mi-") and len(key) > 40 for key in keys)


def test_a_key_is_found_by_itself_and_by_nothing_else() -> None:
    ring = parse_keys(f"keys: [{{name: alice, hash: '{hash_of('sk-1')}', tenant: lab, models: [small]}}]", DEFAULT)
    caller = ring.find("sk-1", 0.0)
    assert caller is not None
    assert (caller.name, caller.tenant, caller.account) == ("alice", "lab", "key:alice")
    assert (caller.may_use("small"), caller.may_use("large"), caller.quota) == (True, False, DEFAULT)
    for other in ("", "sk-", "sk-11", hash_of("sk-1"), "sk-1\udcff"):
        assert ring.find(other, 0.0) is None
    assert KeyRing().find("sk-1", 0.0) is None


def test_what_a_key_does_not_say() -> None:
    ring = parse_keys(f"keys: [{{name: bob, hash: '{hash_of('k')}', limits: {{inputTokens: 7}}}}]", DEFAULT)
    caller = ring.find("k", 0.0)
    assert caller is not None
    assert (caller.tenant, caller.models, caller.quota) == ("bob", None, QuotaConfig(input_tokens=7))
    assert len(parse_keys("", DEFAULT)) == 0


@pytest.mark.parametrize("moment", ["2027-01-01T00:00:00Z", "2027-01-01T01:00:00+01:00", "2027-01-01 00:00:00"])
def test_a_key_expires(moment: str) -> None:
    ring = parse_keys(f"keys: [{{name: a, hash: '{hash_of('k')}', expires: {moment}}}]", DEFAULT)
    assert ring.find("k", 1_798_761_599.0) is not None
    assert ring.find("k", 1_798_761_600.0) is None


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("keys: [{name: a, hash: 'sha256:00'}]", r"$.keys[0].hash"),
        ("keys: [{name: a, key: sk-1}]", r"$.keys[0].key"),
        (f"keys: [{{name: a, hash: '{hash_of('1')}'}}, {{name: a, hash: '{hash_of('2')}'}}]", r"$.keys[1].name"),
        (f"keys: [{{name: a, hash: '{hash_of('1')}'}}, {{name: b, hash: '{hash_of('1')}'}}]", r"$.keys[1].hash"),
        ("keys: [", r"$"),
        ("keys: !!int ''", r"$"),
        ("keys: !!timestamp 'x'", r"$"),
        ("keys: !!bool 'x'", r"$"),
    ],
)
def test_a_bad_file_says_where(text: str, path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_keys(text, DEFAULT)
    assert caught.value.path == path
    assert "sk-1" not in caught.value.message
