"""Takes the pictures of the documentation: `make screenshots`."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from PIL import Image

from matrixinfer.tasks import cancel_and_wait
from tests.browser.chromium import window
from tests.browser.world import HISTORY_MISSING, World

IMAGES = Path(__file__).parents[2] / "docs" / "images"


@asynccontextmanager
async def lively(pods: int, *, per_minute: int) -> AsyncIterator[str]:
    """A dashboard after an hour of traffic, which goes on."""
    world = World(pods, seconds_ago=3_600.0)
    for at in range(3, pods, 17):
        world.caches.trust[world.names[at]] = "partial"
        world.caches.limits[world.names[at]] = (HISTORY_MISSING,)
    world.hour(per_minute)
    for at in range(11, pods, 61):
        world.die(world.names[at])
    async with world.served() as url:
        traffic = asyncio.create_task(world.live(0.2))
        try:
            yield url
        finally:
            await cancel_and_wait(traffic)


async def take(folder: Path, name: str, url: str, *, theme: Literal["light", "dark"], width: int, height: int) -> None:
    async with window(width=width, height=height, theme=theme) as shown:
        page = shown.page
        await page.goto(f"{url}/dashboard")
        await page.locator("#main").wait_for()
        await asyncio.sleep(4.0)  # for some moments of live traffic
        if name == "decision":
            row = page.locator("#decision-list tbody tr").filter(has_text="200").nth(7)
            await page.locator("#pause").click()
            await row.locator("button").click()
            await page.locator("#dialog table").wait_for()
        if name == "fleet-200":
            await page.get_by_role("button", name="requests").click()
        if name == "ladder":
            await page.locator("#ladder").scroll_into_view_if_needed()
        path = folder / f"{name}.png"
        target = page.locator(".columns") if name == "ladder" else page
        await target.screenshot(path=path)
        Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB {' '.join(shown.errors)}")


async def main(folder: Path) -> None:
    async with lively(4, per_minute=240) as url:
        await take(folder, "dashboard", url, theme="light", width=1280, height=1120)
        await take(folder, "dashboard-dark", url, theme="dark", width=1280, height=900)
        await take(folder, "decision", url, theme="light", width=1100, height=620)
        await take(folder, "ladder", url, theme="light", width=1280, height=900)
        await take(folder, "dashboard-narrow", url, theme="light", width=390, height=844)
    async with lively(200, per_minute=240) as url:
        await take(folder, "fleet-200", url, theme="light", width=1280, height=900)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=IMAGES)
    wanted = parser.parse_args().folder
    wanted.mkdir(parents=True, exist_ok=True)
    asyncio.run(main(wanted))
