"""The dashboard in a real Chromium: what a person sees, clicks and hears."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Page, expect

from matrixinfer.tasks import cancel_and_wait
from tests.browser.chromium import BINARY, MISSING, Window, window
from tests.browser.world import HISTORY_MISSING, World
from tests.waiting import DEADLINE_SECONDS

pytestmark = pytest.mark.skipif(BINARY is None, reason=MISSING)
expect.set_options(timeout=DEADLINE_SECONDS * 1000)

MOST_SHIFT = 0.1
HOSTILE = "<img src=x onerror=\"document.title='owned'\">"


@asynccontextmanager
async def dashboard(
    world: World,
    *,
    traffic: bool = False,
    theme: Literal["light", "dark"] = "light",
    width: int = 1440,
) -> AsyncIterator[Window]:
    """The open page. Whatever happens there, nothing is complained about, and the layout stays where it is."""
    async with world.served() as url, window(width=width, theme=theme) as shown:
        task = asyncio.create_task(world.live()) if traffic else None
        try:
            await shown.page.goto(f"{url}/dashboard")
            await expect(shown.page.locator("#main")).to_be_visible()
            await expect(shown.page.locator("#link")).to_have_text("Live")
            yield shown
        finally:
            await cancel_and_wait(task)
        assert shown.errors == []
        assert await shown.shifted() <= MOST_SHIFT, await shown.shifting()
        assert await shown.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


async def complaints(page: Page) -> list[str]:
    """What a screen reader, or someone who sees little, would stumble over: serious and critical findings of axe."""
    found = await Axe().run(page)
    return [
        f"{each['id']}: {each['nodes'][0]['html'][:120]}"
        for each in found.response["violations"]
        if each["impact"] in ("serious", "critical")
    ]


def rows(page: Page) -> Any:
    return page.locator("#endpoints tbody tr")


async def test_a_gateway_without_pods_and_requests_says_what_to_do() -> None:
    async with dashboard(World(0)) as shown:
        page = shown.page
        await expect(page.locator("#no-pods")).to_contain_text("There are no pods now")
        await expect(page.locator("#no-traffic")).to_contain_text("http://127.0.0.1:8080/v1/chat/completions")
        await expect(page.locator("#no-decisions")).to_be_visible()
        await expect(page.locator("#charts")).to_be_hidden()
        assert await complaints(page) == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
async def test_four_pods_with_traffic(theme: Literal["light", "dark"], width: int) -> None:
    world = World(4, seconds_ago=1_800.0)
    world.caches.trust["pod-3.inference"] = "partial"
    world.caches.limits["pod-3.inference"] = (HISTORY_MISSING,)
    world.hour()
    async with dashboard(world, theme=theme, width=width, traffic=True) as shown:
        page = shown.page
        await expect(rows(page)).to_have_count(4)
        before = await page.locator("#tiles .big").last.inner_text()
        await expect(page.locator("#tiles .big").last).not_to_have_text(before)
        await expect(page.locator("#tiles .big").first).to_have_text(re.compile(r"^\d+\.\d %$"))
        await expect(page.locator("#charts svg path.line.third")).to_be_attached()
        await expect(page.get_by_role("img", name=re.compile("Hit rate: reported"))).to_be_visible()
        await expect(page.locator("#decision-list tbody tr").first).to_be_visible()
        assert await complaints(page) == []
        background = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(13, 18, 24)") == (theme == "dark")


async def test_the_numbers_are_those_of_the_snapshot() -> None:
    world = World(2, seconds_ago=300.0)
    world.hour()
    total = world.history.total()
    async with dashboard(world) as shown:
        tiles = shown.page.locator("#tiles .big")
        rate = f"{total.reported_tokens / total.reported_of * 100:.1f} %"
        await expect(tiles.first).to_have_text(rate)
        await expect(tiles.last).to_have_text(f"{total.requests:,}")
        await expect(shown.page.locator("#tiles")).to_contain_text(
            f"estimate: round robin {total.round_robin_tokens / total.round_robin_of * 100:.0f} %"
        )


async def test_where_no_answer_reports_hits_what_was_predicted_is_shown_as_such() -> None:
    world = World(2, seconds_ago=300.0, reports=False)
    world.hour()
    total = world.history.total()
    async with dashboard(world) as shown:
        tiles = shown.page.locator("#tiles")
        predicted = f"{total.predicted_tokens / total.predicted_of * 100:.1f} %"
        await expect(tiles.locator(".big").first).to_have_text(predicted)
        await expect(tiles).to_contain_text("predicted; no answer reports")
        await expect(tiles.locator(".tile").first).to_have_attribute("title", re.compile("drift.injectUsage"))
        await expect(tiles.locator(".big").nth(3)).to_have_text("–")


async def test_a_pod_dies_and_comes_back() -> None:
    world = World(4)
    async with dashboard(world) as shown:
        page = shown.page
        row = rows(page).nth(1)
        await expect(row).to_contain_text("up")
        await expect(page.locator("#alert")).to_be_hidden()
        world.die("pod-1.inference")
        await expect(row.locator(".badge").first).to_have_text("down")
        await expect(page.locator("#alert")).to_have_text("pod-1.inference is down")
        await page.get_by_role("button", name="pod-1.inference").click()
        await expect(page.locator("#dialog")).to_contain_text("has not answered 2 times in a row")
        await page.keyboard.press("Escape")
        world.registry.answered("pod-1.inference")
        await expect(row.locator(".badge").first).to_have_text("up")
        await expect(page.locator("#alert")).to_be_hidden()
        world.registry.leave("pod-1.inference")
        await expect(rows(page)).to_have_count(3)


@pytest.mark.parametrize("width", [1440, 390])
async def test_pods_that_drain_or_have_just_come_say_how_long_and_how_much(width: int) -> None:
    world = World(4)
    world.slow_start_seconds = 7_200.0
    world.shift += 10_000.0
    world.die("pod-1.inference")
    world.registry.answered("pod-1.inference")
    world.shift += 2_500.0
    world.drain("pod-3.inference", 900.0)
    async with dashboard(world, width=width) as shown:
        page = shown.page
        states = [rows(page).nth(number).locator(".badge").first for number in range(4)]
        words = ("up", "slow start 35 %", "up", re.compile(r"^draining (900|8\d\d) s$"))
        for state, said in zip(states, words if width > 720 else ("up", "slow", "up", "drains"), strict=True):
            await expect(state).to_have_text(said, use_inner_text=True)
            assert await state.evaluate("badge => badge.offsetWidth < badge.parentElement.clientWidth - 10")
        await expect(page.locator("#fleet-counts")).to_have_text("4 pods · 1 draining · 1 slow start · 2 up")
        await expect(page.locator("#alert")).to_be_hidden()  # both are meant to be so
        for name, said in (("pod-1", "gets at most 35% of what others have in flight"), ("pod-3", "s at the latest")):
            await page.get_by_role("button", name=f"{name}.inference").click()
            await expect(page.locator("#dialog")).to_contain_text(said)
            await page.keyboard.press("Escape")
        assert await complaints(page) == []
        pod = world.registry.pod("pod-3.inference")
        assert pod is not None
        world.registry.set_drain(pod, None)
        world.slow_start_seconds = 0.0
        await expect(page.locator("#fleet-counts")).to_have_text("4 pods · 4 up")


async def test_two_hundred_pods_are_filtered_and_sorted() -> None:
    world = World(200)
    world.die("pod-150.inference")
    world.caches.trust["pod-9.inference"] = "stale"
    for _ in range(20):
        world.request()
    async with dashboard(world, traffic=True) as shown:
        page = shown.page
        await expect(rows(page)).to_have_count(200)
        await expect(page.locator("#map button")).to_have_count(200)
        box = await page.locator("#fleet").bounding_box()
        assert box is not None
        assert box["height"] < 900  # the table scrolls within itself
        await page.get_by_label("Only problems").check()
        await expect(rows(page)).to_have_count(2)
        await page.get_by_label("Only problems").uncheck()
        await page.get_by_label("Filter by").press_sequentially("pod-19 llama")
        await expect(rows(page)).to_have_count(10)
        await page.get_by_label("Filter by").fill("nothing like it")
        await expect(page.locator("#fleet-counts")).to_have_text("none of 200 endpoints matches")
        await page.get_by_label("Filter by").fill("")
        await page.get_by_role("button", name="state").click()
        await expect(rows(page).first).to_contain_text("pod-150.inference")
        await expect(page.locator("th[aria-sort=ascending]")).to_have_text("state")
        await page.get_by_role("button", name="requests").click()
        counts = [int(text) for text in await page.locator("#endpoints td:nth-child(9)").all_inner_texts()]
        assert counts[0] == max(counts) > 0
        assert await complaints(page) == []


async def test_a_decision_is_opened_and_drawn() -> None:
    world = World(4, seconds_ago=60.0)
    world.hour()
    made = world.request()
    made.notes = ("routed without token ids: the tokenizer failed",)
    async with dashboard(world) as shown:
        page = shown.page
        first = page.locator("#decision-list tbody tr").first
        await expect(first).to_contain_text(made.id)
        await expect(first).to_contain_text("(degraded)")
        await first.get_by_role("button").click()
        dialog = page.get_by_role("dialog")
        await expect(dialog.get_by_role("heading").first).to_have_text(f"Why {made.kept[0].name}?")
        await expect(dialog).to_contain_text(f"{made.cached:,} of {made.counted:,} tokens")
        await expect(dialog).to_contain_text("routed without token ids: the tokenizer failed")
        await expect(dialog.locator("tbody tr")).to_have_count(len(made.kept))
        await expect(dialog.locator("tr.chosen th")).to_contain_text(made.kept[0].name)
        assert await complaints(page) == []
        await page.keyboard.press("Escape")
        await expect(dialog).to_be_hidden()
        assert await page.evaluate("document.activeElement.title") == made.id  # focus is where it was


async def test_a_request_is_found_by_its_id() -> None:
    world = World(2, seconds_ago=60.0)
    world.hour()
    made = world.request()
    async with dashboard(world) as shown:
        page = shown.page
        await page.get_by_label("Request ID").fill(f" {made.id} ")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("dialog")).to_contain_text(made.id)
        await page.get_by_role("button", name="Close").click()
        await page.get_by_label("Request ID").fill("nobody's&limit=1")
        await page.get_by_role("button", name="Explain").click()
        await expect(page.get_by_role("dialog")).to_contain_text("none of them is on the request nobody's&limit=1")
        await expect(page.get_by_role("dialog")).to_contain_text("keeps the last 1,000 decisions")


async def test_a_paused_list_stands_still() -> None:
    world = World(2)
    world.request()
    async with dashboard(world) as shown:
        page = shown.page
        first = page.locator("#decision-list tbody tr").first
        before = await first.inner_text()
        await page.get_by_role("button", name="Pause").click()
        version = world.request().id
        await expect(page.locator("#tiles .big").last).to_have_text("2")
        assert await first.inner_text() == before
        await page.get_by_role("button", name="Resume").click()
        await expect(first).to_contain_text(version)


async def test_the_list_is_held_while_someone_is_in_it() -> None:
    world = World(2)
    first = world.request()
    async with dashboard(world) as shown:
        page = shown.page
        row = page.locator("#decision-list tbody tr").first
        await row.get_by_role("button").focus()
        await expect(page.locator("#decisions-note")).to_have_text("held while you are here")
        second = world.request()
        await expect(page.locator("#tiles .big").last).to_have_text("2")
        await expect(row).to_contain_text(first.id)
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("dialog")).to_contain_text(first.id)
        await page.keyboard.press("Escape")
        await page.locator("#pause").focus()
        await expect(row).to_contain_text(second.id)


async def test_text_from_engines_is_never_markup() -> None:
    world = World(0, names=[HOSTILE, "b"])
    world.come(HOSTILE, HOSTILE)
    world.caches.trust[HOSTILE] = "partial"
    world.caches.limits[HOSTILE] = (HOSTILE,)
    world.talks = [world.talk(HOSTILE)]
    made = world.request()
    made.id = HOSTILE
    made.notes = (HOSTILE,)
    async with dashboard(world) as shown:
        page = shown.page
        await page.locator("#endpoints button").filter(has_text="onerror").click()
        await expect(page.locator("#dialog")).to_contain_text(HOSTILE)
        await page.keyboard.press("Escape")
        await page.locator("#decision-list button").click()
        await expect(page.locator("#dialog .details")).to_contain_text(HOSTILE)
        assert await page.locator("img[src='x']").count() == 0
        assert await page.title() == "MatrixInfer Gateway"


async def test_the_doctor_is_asked_and_its_findings_are_shown() -> None:
    world = World(2)
    answer = {
        "findings": [
            {"pod": "pod-0.inference", "check": "health", "level": "ok", "message": "the engine answers", "fix": None},
            {"pod": "pod-1.inference", "check": "feed", "level": "blind", "message": "no events", "fix": "open <port>"},
        ],
        "summary": {"pods": 2, "ok": 1, "warning": 0, "blind": 1, "exit_code": 2},
    }
    world.doctor = (sys.executable, "-c", f"print({json.dumps(answer)!r})")
    async with dashboard(world) as shown:
        page = shown.page
        await page.get_by_role("button", name="Examine engines").click()
        await expect(page.locator("#doctor-status")).to_have_text("2 pods: 1 blind, 0 warnings.")
        await expect(page.locator("#findings details").first).to_contain_text("Fix: open <port>")
        await expect(page.locator("#findings details[open]")).to_have_count(1)
        assert await complaints(page) == []


async def test_the_ladder_says_where_tokens_were_lost_and_what_helps() -> None:
    world = World(2, seconds_ago=600.0)
    world.hour()
    world.tally.add("sampled:evicted", 0.2 * world.tally["prompt"])
    rungs = {each.name: each for each in world.ladder().rungs}
    async with dashboard(world) as shown:
        items = shown.page.locator("#rungs > li")
        await expect(items).to_have_count(5)
        share = rungs["predicted"].share
        assert share is not None
        await expect(items.nth(3)).to_contain_text(f"{share * 100:.1f} %")
        await expect(items.nth(1)).to_contain_text("the fleet's caches are too small")
        await expect(items.nth(1)).to_contain_text("more KV tokens")
        assert await complaints(shown.page) == []


async def test_everything_is_reached_by_keyboard_and_the_theme_is_kept() -> None:
    world = World(2)
    world.request()
    async with dashboard(world) as shown:
        page = shown.page
        seen = []
        for _ in range(60):
            await page.keyboard.press("Tab")
            seen.append(
                await page.evaluate(
                    "(document.activeElement.id || document.activeElement.textContent.trim() || 'body').slice(0, 40)"
                )
            )
        for each in ("request-id", "theme", "fleet-filter", "fleet-problems", "pod-0.inference", "pause", "examine"):
            assert each in seen
        for theme in ("light", "dark"):
            await page.locator("#theme").press("Enter")
            assert await page.evaluate("document.documentElement.dataset.theme") == theme
        await page.reload()
        await expect(page.locator("#main")).to_be_visible()
        assert await page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 18, 24)"


async def test_a_gateway_that_goes_away_is_noticed_and_found_again() -> None:
    world = World(2)
    async with world.served() as url, window() as shown:
        page = shown.page
        await page.goto(f"{url}/dashboard")
        await expect(page.locator("#link")).to_have_text("Live")
        world.draining.set()
        await expect(page.locator("#link")).to_have_text(re.compile("stopping; shown as of|Reconnecting; shown as of"))
        world.draining.clear()
        world.die("pod-0.inference")
        await expect(page.locator("#link")).to_have_text("Live")
        await expect(page.locator("#alert")).to_contain_text("pod-0.inference is down")
