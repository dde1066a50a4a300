"""Some hundred streams at once over two workers, and what makes such a test fail. `make test-streams` has thousands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.streams.run import Result, Sample, Wave, run

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


async def test_every_stream_is_whole_and_nothing_stays_open(tmp_path: Path) -> None:
    result = await run(tmp_path, streams=300, workers=2, waves=2, pieces=10, pause=0.5)
    assert [*result.complaints()] == []
    assert [len(wave.first_seconds) for wave in result.waves] == [300, 300]
    print("\n".join(result.lines()))


def result(*waves: Wave) -> Result:
    return Result(workers=1, before=Sample(memory=[100_000_000], descriptors=[50]), waves=list(waves))


def wave(*, most_open: float = 100, peak: int = 104_000_000, rest: int = 100_000_000, wrong: str | None = None) -> Wave:
    made = Wave(streams=100, most_open=most_open, wrong=[] if wrong is None else [wrong])
    made.peak, made.rest = (Sample(memory=[each], descriptors=[50]) for each in (peak, rest))
    return made


@pytest.mark.parametrize(
    ("last", "complaint"),
    [
        (wave(), None),
        (wave(wrong="cut off"), "1 streams are not whole, such as: cut off"),
        (wave(most_open=99), "99 streams were open at a time, expected 100"),
        (wave(peak=120_000_000), "a stream takes 200,000 bytes"),
        (wave(rest=120_000_000), "worker 1 keeps 20,000,000 bytes more"),
    ],
)
def test_what_does_not_pass(last: Wave, complaint: str | None) -> None:
    found = [*result(wave(), last).complaints()]
    assert (found == []) if complaint is None else (complaint in found[0])
