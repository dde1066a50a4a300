"""Live frames that wait for a replay."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

Frame = tuple[int, bytes]
"""The number and the payload."""


class HeldFrames:
    """A queue of live frames in the order of their numbers. It counts its bytes; whoever fills it keeps the bounds."""

    def __init__(self) -> None:
        self.bytes = 0
        self._frames: deque[Frame] = deque()

    def __len__(self) -> int:
        return len(self._frames)

    def __iter__(self) -> Iterator[Frame]:
        return iter(self._frames)

    @property
    def last(self) -> Frame | None:
        """The frame that came last."""
        return self._frames[-1] if self._frames else None

    def append(self, frame: Frame) -> None:
        """Queue a frame behind the others."""
        self._frames.append(frame)
        self.bytes += len(frame[1])

    def put_back(self, frame: Frame) -> None:
        """Queue a frame before the others."""
        self._frames.appendleft(frame)
        self.bytes += len(frame[1])

    def pop(self) -> Frame:
        """Take the first frame. Raises `IndexError` when the queue is empty."""
        frame = self._frames.popleft()
        self.bytes -= len(frame[1])
        return frame

    def clear(self) -> None:
        """Drop every frame."""
        self._frames.clear()
        self.bytes = 0
