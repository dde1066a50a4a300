"""Ids of responses say whose they are."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.access.response_ids import ResponseIds

GOLDEN = "resp_01010101010101010101010101010101996e31c974e159efa63f1998c6ba31cbb6e082ee0f2d536d"
names = st.text(max_size=20)


def made(secret: bytes = b"s" * 32, seed: int = 0) -> ResponseIds:
    return ResponseIds(secret, random.Random(seed).randbytes)


@given(names, names)
def test_a_response_belongs_to_the_tenant_that_it_was_made_for(tenant: str, other: str) -> None:
    name = made().new(tenant)
    assert made().is_owner(tenant, name) is True
    assert made().is_owner(other, name) is (other == tenant)
    assert made(b"t" * 32).is_owner(tenant, name) is None


@given(st.integers(5, 84), st.sampled_from("0123456789abcdef"))
def test_an_id_that_was_changed_is_nobody_s(position: int, digit: str) -> None:
    name = made().new("ann")
    changed = name[:position] + digit + name[position + 1 :]
    assert (made().is_owner("ann", changed) is True) is (changed == name)


@given(st.text())
def test_other_ids_say_nothing(text: str) -> None:
    assert made().is_owner("ann", text) is None


def test_no_two_ids_are_the_same_and_engines_take_them() -> None:
    ids = made()
    found = {ids.new("ann") for _ in range(1000)}
    assert len(found) == 1000
    assert {len(each) for each in found} == {85}
    assert all(each.startswith("resp_") and each.isascii() for each in found)


def test_gateways_of_all_releases_make_and_know_the_same_ids() -> None:
    name = ResponseIds(b"s" * 32, lambda count: b"\1" * count).new("ann")
    assert name == GOLDEN
