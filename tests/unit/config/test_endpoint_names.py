import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.config.endpoint_names import TIERS, EndpointName


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a", ("a", None, None)),
        ("a@dp0", ("a", 0, None)),
        ("a@dp12~host", ("a", 12, "host")),
        ("a~device", ("a", None, "device")),
        ("", ("", None, None)),
        # No such parts: all of it is the pod's name.
        ("a@dp", ("a@dp", None, None)),
        ("a@dp01", ("a@dp01", None, None)),
        ("a@dp²", ("a@dp²", None, None)),
        ("a~disk", ("a~disk", None, None)),
        ("a~b", ("a~b", None, None)),
        ("a@dp1@dp0", ("a@dp1", 0, None)),
        ("a~host~device", ("a~host", None, "device")),
    ],
)
def test_a_name_is_taken_apart_and_put_together(name: str, parts: tuple[str, int | None, str | None]) -> None:
    parsed = EndpointName.parse(name)
    assert parsed == parts
    assert str(parsed) == name


def test_the_parts_of_a_name_make_other_names() -> None:
    name = EndpointName.parse("a@dp1~host")
    assert (name.endpoint, name.rank_label, name.up_to("device")) == ("a@dp1", "dp1", "a@dp1~device")
    assert (EndpointName("a").endpoint, EndpointName("a").rank_label) == ("a", "")


@given(st.text(alphabet="a@dp~01host."), st.none() | st.integers(0, 99), st.none() | st.sampled_from(TIERS))
def test_whatever_the_pod_is_called_a_rank_and_a_tier_are_found_again(
    pod: str, rank: int | None, tier: str | None
) -> None:
    name = EndpointName(pod, rank, tier)
    if rank is not None or (tier is not None and EndpointName.parse(pod).rank is None):
        assert EndpointName.parse(str(name)) == name
    assert str(EndpointName.parse(str(name))) == str(name)
