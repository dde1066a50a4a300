"""The dense table against a dict."""

from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.kvevents.table import BlockTable

# Few buckets and repetitive bytes, so that a key's bytes also occur across records.
blocks = st.one_of(
    st.integers(0, 3),
    st.sampled_from([0, 1 << 32, 1 << 56, 0x0101010101010101, 2**64 - 1, 7 << 11, 9 << 11]),
    st.integers(0, 2**64 - 1),
)


@given(st.lists(st.tuples(st.sampled_from(["add", "add", "pop", "get"]), blocks, st.sampled_from([0, 1, 2**32 - 1]))))
def test_the_table_does_what_a_dict_does(steps: list[tuple[str, int, int]]) -> None:
    table, expected = BlockTable(), dict[int, int]()
    for step, block, number in steps:
        if step == "pop":
            assert table.get(block) == expected.pop(block, None)
            table.discard((block, block))
        elif step == "add" and block not in expected:
            table.add([block], number)
            expected[block] = number
        assert table.get(block) == expected.get(block)
        assert len(table) == len(expected)
    for block, number in expected.items():
        assert table.get(block) == number


def test_bytes_that_occur_across_records_are_not_a_key() -> None:
    table = BlockTable()
    one, other = 5 | 1 << 40, 5 | 2 << 40  # of one bucket, by their low bits
    across = 5 | 5 << 32  # the first's number and the beginning of the second
    table.add([one], 5)
    table.add([other], 9)
    table.discard([across])
    assert (table.get(across), len(table)) == (None, 2)
    table.add([across], 7)
    assert (table.get(one), table.get(other), table.get(across)) == (5, 9, 7)
    table.discard([across])
    assert (table.get(one), table.get(other), table.get(across), len(table)) == (5, 9, None, 2)
