from __future__ import annotations

import re

from hypothesis import assume, given
from hypothesis import strategies as st

from matrixinfer.access.salts import Salts, encoded

SALTS = Salts("0123456789abcdef0123456789abcdef")
own = st.none() | st.text(max_size=20)


@given(st.text(max_size=20), own, st.text(max_size=20), own)
def test_no_two_requests_share_a_salt_unless_tenant_and_own_salt_are_the_same(
    tenant: str, salt: str | None, other: str, other_salt: str | None
) -> None:
    assume((tenant, salt) != (other, other_salt))
    assert encoded(tenant, salt) != encoded(other, other_salt)
    assert SALTS.of(tenant, salt) != SALTS.of(other, other_salt)


@given(st.text(max_size=20), st.text(max_size=20))
def test_no_tenant_s_encoding_begins_with_another_s(tenant: str, other: str) -> None:
    assume(tenant != other)
    assert not encoded(tenant, None)[:-1].startswith(encoded(other, None)[:-1])


@given(st.text(max_size=300), own)
def test_every_engine_takes_the_salt(tenant: str, salt: str | None) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", SALTS.of(tenant, salt))


def test_a_salt_cannot_be_asked_for_by_its_value() -> None:
    theirs = SALTS.of("theirs", None)
    assert SALTS.of("mine", theirs) != theirs
    assert Salts("another secret that is long enough").of("theirs", None) != theirs


def test_gateways_of_all_releases_derive_the_same_salts() -> None:
    assert SALTS.of("lab", None) == "voU7UnKYYQ0F-abxtsN_VCAMRKyr2QZ0tA-ntj088Kw"
    assert SALTS.of("lab", "mine") == "Vqk3C1s-qzyTgSH7QmpFp7yVF0z6fYue4y3xiRVcf9I"
