"""The report: what it advises, and that the page stands alone."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from typing import get_args

import numpy as np
import pytest

from matrixinfer.study.fleet import Fleet
from matrixinfer.study.generators import generate
from matrixinfer.study.policies import chosen as policies
from matrixinfer.study.presets import preset
from matrixinfer.study.report.advice import Advice, Results, advise, chosen, regret
from matrixinfer.study.report.charts import ladder as drawn_ladder
from matrixinfer.study.report.charts import load_maps
from matrixinfer.study.report.page import Chapter, page
from matrixinfer.study.report.png import png
from matrixinfer.study.runs import replay_all
from matrixinfer.traffic.ladder.rungs import Ladder, Loss, Rung, RungName


def results(time: float | None, hit: float = 0.5, **more: float | None) -> Results:
    usual: dict[str, float | int | None] = {
        "hit_rate": hit,
        "predicted_hit_rate": hit + 0.01,
        "ttft_mean_s": time,
        "ttft_p50_s": time,
        "ttft_p90_s": time,
        "ttft_p99_s": time,
        "tpot_s": 0.02,
        "imbalance": 1.0,
        "requests": 100,
        "too_long": 0,
        "broken_off": 0,
        "preemptions": 0,
    }
    return {**usual, **more}


def ladder(**shares: float | None) -> Ladder:
    """A ladder with these shares, and a loss on the way to each rung."""
    rungs, before = [], 1.0
    for name in get_args(RungName):
        share = shares.get(name, before)
        lost = max(0.0, before - (before if share is None else share))
        loss = Loss(
            name="l", tokens=1, share=lost, is_estimate=False, cause=f"lost at <{name}>", remedy=f"more for {name}"
        )
        losses = [loss] if lost else []
        rungs.append(
            Rung(
                name=name,
                tokens=None,
                share=share,
                of_tokens=100,
                is_estimate=False,
                meaning=f"means {name}",
                cause=loss.cause if lost else None,
                remedy=loss.remedy if lost else None,
                losses=losses,
            )
        )
        before = before if share is None else share
    return Ladder(
        requests=1,
        prompt_tokens=100,
        reported_requests=1,
        capacity_tokens=None,
        pods=1,
        sampled_share=1.0,
        error_share=0.0,
        rungs=rungs,
    )


GOOD = ladder(ideal=0.55, capacity=0.52, perfect=0.52, predicted=0.51, reported=0.5)


def advised(found: Mapping[str, Results], of_all: Ladder = GOOD) -> Advice:
    return advise(found, dict.fromkeys(found, of_all))


def titles(advice: Advice) -> list[str]:
    return [point.title for point in advice.points]


def test_the_default_is_kept_unless_another_profile_is_clearly_faster() -> None:
    others = {"round_robin": results(2.0), "pooled": results(0.8, 0.52)}
    same = {"kv_aware": results(1.01), "cached_share": results(1.0), **others}
    assert chosen(same) == "kv_aware"
    advice = advised(same)
    assert advice.headline == "Keep the default profile, kv_aware"
    assert "50% less than with round_robin (2.00 s)" in advice.summary
    assert "is 21% below" in advice.summary
    assert titles(advice) == ["The caches are large enough", "Routing finds what is there"]
    faster = {"kv_aware": results(1.2), "cached_share": results(1.0), **others}
    advice = advised(faster)
    assert advice.headline == "Use the profile cached_share"
    assert "`matrixinfer serve --policy cached_share`" in advice.summary


def test_a_rival_that_is_faster_is_named() -> None:
    advice = advised({"kv_aware": results(1.0), "lmetric": results(0.8)})
    assert "`matrixinfer tune` looks for" in advice.summary
    assert advice.headline == "Keep the default profile, kv_aware, though lmetric is 20% faster here"
    assert advised({"random": results(1.0)}).headline.startswith("random is fastest; no profile")
    assert advised({"kv_aware": results(None)}).headline == "No policy has a result"


def test_each_finding_has_its_remedy() -> None:
    found = results(1.0, 0.3, preemptions=50, ttft_p50_s=0.01, ttft_p99_s=5.0, imbalance=2.0, too_long=2, broken_off=1)
    lossy = ladder(ideal=0.9, capacity=0.6, perfect=0.55, predicted=0.35, reported=0.3)
    advice = advised({"kv_aware": found, "pooled": results(0.5, 0.6)}, lossy)
    assert titles(advice) == [
        "The caches are too small",
        "Routing leaves hits behind",
        "Engines run out of cache while they compute",
        "Some requests wait in queues",
        "Work is uneven",
        "Requests without an answer",
    ]
    assert all(point.remedy for point in advice.points)
    assert advice.points[0].text.startswith("30.0% of the prompt tokens were seen before")
    assert advice.points[0].remedy == "More for capacity."
    assert advice.points[1].text.endswith("The largest loss, 20.0%: lost at <predicted>.")
    assert advice.points[1].remedy == "More for predicted."
    assert advice.points[-1].text.startswith("3 requests")
    assert titles(advised({"kv_aware": results(1.0)}, ladder(capacity=None)))[0] == "Hits"


def test_the_ladder_shows_each_rung_with_its_losses_and_what_is_unknown() -> None:
    shown = drawn_ladder(ladder(ideal=0.7, capacity=None, perfect=0.41, predicted=0.4099).rungs)
    assert [name in shown for name in get_args(RungName)] == [True] * 5
    assert "unknown" in shown
    assert "−30.0%</em> lost at &lt;ideal&gt;<br>→ more for ideal" in shown
    assert "lost at &lt;predicted&gt;" not in shown  # too little to show


def test_regret_is_against_the_better_bound() -> None:
    found = {"kv_aware": results(1.0), "pooled": results(0.8), "clairvoyant": results(0.5)}
    assert regret(found, "kv_aware") == pytest.approx(2.0)
    assert regret({"kv_aware": results(1.0)}, "kv_aware") is None


class Reader(HTMLParser):
    """Follows which elements are open, and what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("br", "meta", "img", "path", "link"):
            self.open.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        if tag != "path":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def chapter(names: str, trace: str = "a trace") -> Chapter:
    drawn = generate("multi-round:sessions=10,turns=3", seed=0)
    shape = preset("llama-8b-h100").shape(drawn.block_size)
    outcomes = list(replay_all(drawn, Fleet(shape=shape, pods=3, pod_tokens=20_000), policies(names)))
    settings: dict[str, object] = {"requests": 30, "pods": 3, "kv_tokens_per_pod": 20_000, "engine": "e"}
    return Chapter(trace=trace, settings=settings, outcomes=outcomes)


@pytest.mark.parametrize("names", ["random", "pooled", "round_robin,session_sticky,kv_aware,pooled,clairvoyant"])
def test_the_page_is_whole_and_loads_nothing(names: str) -> None:
    reader = Reader()
    text = page([chapter(names, "<script>alert(1)</script>"), chapter(names)])
    reader.feed(text)
    assert reader.open == []
    assert all(load.startswith("data:image/png;base64,") for load in reader.loads)
    assert "<script" not in text
    assert not re.search(r"url\(|@import|https?://", text)
    assert all(name in reader.text for name in names.split(",") if names != "pooled")
    assert "nan" not in text.lower().replace("finance", "")


def test_what_an_access_log_recorded_is_shown_to_compare_with() -> None:
    one = chapter("kv_aware")
    assert "As recorded" not in page([one])
    recorded = {"hit_rate": 0.4, "ttft_mean_s": 0.25, "ttft_p90_s": None}
    logged = replace(one, settings={**one.settings, "trace": {"recorded": recorded}})
    assert "As recorded: hit rate 40.0%, mean time to first token 250 ms" in page([logged])


def test_heat_maps_show_each_pod_over_time_in_bounded_size() -> None:
    found = chapter("random").outcomes[0]
    many = replace(found, policy="p", requests=(), samples=list(found.samples) * 400)
    assert len(load_maps([many], "p")) < 20_000


def test_the_image_is_a_png_with_these_pixels() -> None:
    pixels = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    data = png(pixels)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (3, 2)
    length = struct.unpack(">I", data[33:37])[0]
    rows = zlib.decompress(data[41 : 41 + length])
    assert rows == b"\0" + pixels[0].tobytes() + b"\0" + pixels[1].tobytes()
