import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.index.redis import layout

LONG = b"pod-a.ns.svc.cluster.local"


def test_keys_are_those_of_the_documented_layout() -> None:
    assert layout.prefix_of("org/model") + "12345678901234567890" == "matrix:kv:block:org/model@12345678901234567890"
    assert layout.meta_key("org/model") == "matrix:kv:meta:org/model"


@given(model=st.text(min_size=1), block=st.integers(0, 2**64 - 1))
def test_a_block_is_read_back_from_its_key(model: str, block: int) -> None:
    assert layout.block_of(f"{layout.prefix_of(model)}{block}") == (model, block)


@pytest.mark.parametrize(
    "key", ["", "matrix:kv:block:", "matrix:kv:block:m@", "matrix:kv:block:m@1x", "matrix:kv:block:7", "other:m@7"]
)
def test_other_keys_are_not_blocks(key: str) -> None:
    assert layout.block_of(key) is None


def test_names_are_compared_without_the_clusters_domain() -> None:
    assert layout.canonical("pod-a.ns.svc.cluster.local") == layout.canonical("pod-a.ns") == "pod-a.ns"
    assert layout.canonical("svc.cluster.local.pod") == "svc.cluster.local.pod"


@pytest.mark.parametrize(
    ("text", "number"),
    [(b"0", 0), (b"007", 7), ("1703123456", 1_703_123_456), (b"9" * 19, 10**19 - 1)],
)
def test_numbers_are_digits(text: bytes | str, number: int) -> None:
    assert layout.number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        None,
        b"",
        b"-1",
        b"+1",
        b" 1",
        b"1\n",
        b"1.5",
        b"1e9",
        b"0x10",
        b"1_000",
        b"inf",
        b"nan",
        b"\xff",
        "٣",
        b"1" * 20,
    ],
)
def test_any_other_text_is_not_a_number(text: bytes | str | None) -> None:
    assert layout.number(text) is None


def test_the_newest_stamp_of_two_spellings_counts() -> None:
    assert layout.named({LONG: b"9", b"pod-a.ns": b"5", b"pod-b.ns": b"soon"}) == {
        "pod-a.ns": 9,
        "pod-b.ns": layout.UNDATED,
    }
    assert layout.named({LONG: b"soon", b"pod-a.ns": b"5"}) == {"pod-a.ns": 5}
    assert layout.named({b"pod-a.ns": b"5", LONG: b"soon"}) == {"pod-a.ns": 5}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (b"1703123456", 1_703_123_456),
        (b"00001703123456", 1_703_123_456),
        (b"1703123456.789", 1_703_123_456),
        (b"1703123456789", 1_703_123_456),
        (b"1703123456789012", 1_703_123_456),
        (b"1703123456789012345", 1_703_123_456),
        (b"253402300799", 253_402_300_799),  # the year 9999
        (b"0", 0),
        (b"000", 0),
    ],
)
def test_stamps_in_other_forms_are_read(text: bytes, seconds: int) -> None:
    assert layout.stamp_of(text) == seconds


@pytest.mark.parametrize(
    "text", [b"", b"soon", b"-5", b" 1", b"1e9", b"1_000", b"\xff", b"9" * 20, b"1.5.5", b".5", b"1\n"]
)
def test_a_stamp_in_any_other_form_says_nothing_about_the_age(text: bytes) -> None:
    assert layout.stamp_of(text) == layout.UNDATED


def test_an_undated_entry_counts_unless_a_writer_of_ours_writes_for_the_pod() -> None:
    floors = layout.floors({b"a": b"5"}, {b"b": b"5"}, now=1000, max_age=100, starts={"c": 990.0})
    assert {pod: floors.counts(pod, layout.UNDATED) for pod in "abcd"} == {"a": False, "b": False, "c": True, "d": True}


def test_a_stamp_counts_only_if_it_is_younger_than_the_engine_or_vouched_for() -> None:
    starts = {"a": 990.5, "b": 990.5}
    floors = layout.floors({}, {b"b": b"1001"}, now=1000, max_age=100, starts=starts)
    assert [floors.counts("a", at) for at in (989, 990, 991)] == [False, False, True]
    assert floors.counts("b", 1)
    assert floors.counts("c", 901)
    floors = layout.floors({b"a": b"7"}, {}, now=1000, max_age=100, starts=starts)
    assert [floors.counts("a", at) for at in (989, 990, 991)] == [False, True, True]


def test_names_that_are_not_utf8_stay_different() -> None:
    assert len(layout.named({b"\xff": b"1", b"\xfe": b"1"})) == 2
    assert len(layout.floors({b"\xff": b"1"}, {b"\xfe": b"1"}, now=5, max_age=1).by_pod) == 2


@pytest.mark.parametrize(
    ("epoch", "lease", "floor"),
    [
        (0, 0, 900),  # without a living writer, the age decides
        (0, 999, 900),
        (0, 1000, 0),  # with a living writer, it does not
        (950, 1000, 950),
        (950, 0, 950),
        (800, 0, 900),
    ],
)
def test_the_smallest_stamp_that_counts(epoch: int, lease: int, floor: int) -> None:
    assert layout.floor_of(now=1000, epoch=epoch, lease=lease, max_age=100) == floor
    epochs, leases = {b"pod-a": str(epoch).encode()}, {b"pod-a": str(lease).encode()}
    assert layout.floors(epochs, leases, now=1000, max_age=100).by_pod == {"pod-a": floor}


def test_missing_or_malformed_rows_are_treated_as_absent() -> None:
    floors = layout.floors({b"pod-a": b"950"}, {b"pod-b": b"soon"}, now=1000, max_age=100)
    assert floors.by_pod == {"pod-a": 950, "pod-b": 900}


@given(st.integers(0, 10), st.integers(0, 10), st.integers(0, 10), st.integers(0, 10))
def test_a_clear_puts_the_epoch_above_all_stamps_and_stamps_at_least_there(
    now: int, epoch: int, last: int, later: int
) -> None:
    cleared = layout.next_epoch(now, epoch, last)
    assert cleared > last
    assert cleared > layout.stamp(now, epoch)
    assert layout.stamp(later, cleared) >= cleared


PODS = ("a", "b", "c")


@given(
    st.lists(st.dictionaries(st.sampled_from(PODS), st.integers(0, 4)), max_size=6),
    st.dictionaries(st.sampled_from(PODS), st.integers(0, 4)),
    st.integers(0, 4),
)
def test_consecutive_blocks_with_a_sufficient_stamp_count(
    blocks: list[dict[str, int]], floors: dict[str, int], default: int
) -> None:
    expected = {}
    for pod in PODS:
        good = [block.get(pod, -1) >= floors.get(pod, default) for block in blocks]
        if held := [*good, False].index(False):
            expected[pod] = held
    entries = [{pod.encode(): str(at).encode() for pod, at in block.items()} for block in blocks]
    assert layout.count(entries, layout.Floors(by_pod=floors, default=default)) == expected


def test_pairs_are_read_from_a_flat_list() -> None:
    assert layout.pairs([b"a", 3, b"b", 1]) == {"a": 3, "b": 1}
    assert layout.pairs([]) == {}


@pytest.mark.parametrize("flat", [[b"a"], [b"a", b"3"], [3, b"a"], [b"a", 3, b"b"], [None, None]])
def test_a_malformed_list_of_pairs_is_refused(flat: list[bytes | int]) -> None:
    with pytest.raises(ValueError, match=r"expected pairs|expected names"):
        layout.pairs(flat)


@given(
    st.lists(st.dictionaries(st.sampled_from(PODS), st.integers(0, 4)), max_size=6),
    st.dictionaries(st.sampled_from(PODS), st.integers(0, 4)),
    st.integers(0, 4),
    st.sets(st.sampled_from((*PODS, "d"))),
)
def test_the_last_block_with_a_sufficient_stamp_is_found(
    blocks: list[dict[str, int]], floors: dict[str, int], default: int, asked: set[str]
) -> None:
    expected = {}
    for pod in asked:
        good = [at for at, block in enumerate(blocks) if block.get(pod, -1) >= floors.get(pod, default)]
        if good:
            expected[pod] = good[-1]
    entries = [{pod.encode(): str(at).encode() for pod, at in block.items()} for block in blocks]
    assert layout.last(entries, layout.Floors(by_pod=floors, default=default), asked) == expected


def test_ends_are_found_and_never_match() -> None:
    entries = [{b"a": b"5", b"a~ends": b"5"}, {b"a~ends": b"5"}]
    assert layout.count(entries, layout.Floors(by_pod={}, default=1)) == {"a": 1}
    assert layout.last(entries, layout.Floors(by_pod={}, default=1), ["a", "a~ends"]) == {"a": 0, "a~ends": 1}
