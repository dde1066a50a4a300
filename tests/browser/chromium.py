"""A real Chromium, driven over its own protocol; Debian's, as the package of the driver brings no browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

from playwright.async_api import ConsoleMessage, Error, Page, async_playwright

BINARY = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
MISSING = "no Chromium: install Debian's package `chromium`, or set CHROMIUM to the path of one"
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_SHIFTS = """
window.shifts = 0;
window.shifted = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) {
    if (entry.hadRecentInput) continue;
    window.shifts += entry.value;
    for (const source of entry.sources) window.shifted.push(source.node?.id || source.node?.parentElement?.outerHTML.slice(0, 90));
  }
}).observe({type: "layout-shift", buffered: true});
"""


@dataclass
class Window:
    """A page, and what it complained about."""

    page: Page
    errors: list[str] = field(default_factory=list)

    def on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def on_error(self, error: Error) -> None:
        self.errors.append(str(error))

    async def shifted(self) -> float:
        """How much the layout has shifted so far."""
        return float(await self.page.evaluate("window.shifts"))

    async def shifting(self) -> list[str]:
        """What has shifted, for a person who wonders."""
        return [str(each) for each in await self.page.evaluate("window.shifted")]


@asynccontextmanager
async def window(
    *,
    width: int = 1440,
    height: int = 900,
    theme: Literal["light", "dark"] = "light",
    scale: float = 1.0,
) -> AsyncIterator[Window]:
    """A window that shows nothing yet."""
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=BINARY, args=list(_FLAGS), timeout=120_000)
        try:
            context = await browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme=theme,
                reduced_motion="reduce",
                device_scale_factor=scale,
            )
            context.set_default_timeout(60_000)
            page = await context.new_page()
            await page.add_init_script(_SHIFTS)
            shown = Window(page)
            page.on("console", shown.on_console)
            page.on("pageerror", shown.on_error)
            yield shown
        finally:
            await browser.close()
