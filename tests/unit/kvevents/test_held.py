import pytest

from matrixinfer.kvevents.held import HeldFrames


def test_held_frames_keep_their_order_and_count_their_bytes() -> None:
    held = HeldFrames()
    assert (len(held), held.last, held.bytes) == (0, None, 0)
    held.append((2, b"two"))
    held.append((3, b"three"))
    held.put_back((1, b"1"))
    assert [number for number, _ in held] == [1, 2, 3]
    assert (held.last, held.bytes) == ((3, b"three"), 9)
    assert held.pop() == (1, b"1")
    assert held.bytes == 8
    held.clear()
    assert (len(held), held.bytes) == (0, 0)
    with pytest.raises(IndexError):
        held.pop()
