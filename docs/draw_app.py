"""The page of the web app: with two people in boxes, docs/images/app.png, and on a phone, docs/images/app_phone.png.

    python docs/draw_app.py [FOLDER]

Needs Playwright and a Chromium, as the tests of the app do. To be run again when the page or the embedded model
changed.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect, sync_playwright

from face_fusion_pipeline.app.server import serving
from face_fusion_pipeline.cli import app, build_parser


OUT = Path(__file__).parent / "images"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}  # pixels of the browser's window
BOXES = [(0.14, 0.3, 0.38, 0.62), (0.62, 0.3, 0.86, 0.62)]  # XYXY in [0, 1] of the area
PATIENCE = 600_000  # milliseconds; two pictures take their time on two cores


def draw_box(page: Page, box: tuple[float, float, float, float]) -> None:
    area = page.locator(".places-area")
    area.scroll_into_view_if_needed()
    frame: Any = area.bounding_box()
    x0, x1 = (frame["x"] + part * frame["width"] for part in box[::2])
    y0, y1 = (frame["y"] + part * frame["height"] for part in box[1::2])
    page.mouse.move(x0, y0)
    page.mouse.down()
    page.mouse.move(x1, y1, steps=3)
    page.mouse.up()


def draw_phone(page: Page, out: Path) -> None:
    """What a phone shows when the example is done: the results, and the button below them."""
    page.get_by_role("button", name="One photo").click()
    expect(page.locator("#status")).to_contain_text("Done.")
    page.wait_for_timeout(1000)  # the pictures appear
    page.screenshot(path=out)


def draw(page: Page, out: Path) -> None:
    """Fill the form of the page that is open, and write a picture of the whole page when the results are there."""
    page.get_by_role("button", name="Two people").click()
    page.locator("#cancel").click()
    expect(page.locator("#status")).to_contain_text("Cancelled")
    page.get_by_role("button", name="Where people go").click()
    page.wait_for_timeout(1000)  # the section unfolds
    for box in BOXES:
        draw_box(page, box)
    page.locator("#generate").click()
    expect(page.locator("#status")).to_contain_text("Done.")
    page.mouse.move(0, 0)
    page.evaluate("window.scrollTo(0, 0)")  # where the buttons are in their place
    page.wait_for_timeout(1000)  # the pictures appear
    page.screenshot(path=out, full_page=True)


def main(out: Path = OUT) -> None:
    engine = app.load_engine(build_parser().parse_args(["app"]))
    browser = os.environ.get("FACE_FUSION_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    expect.set_options(timeout=PATIENCE)
    with serving(engine, port=0) as address, sync_playwright() as playwright:
        window = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for size, draws, name in ((DESKTOP, draw, "app.png"), (PHONE, draw_phone, "app_phone.png")):
            page = window.new_page(viewport=size)
            page.set_default_timeout(PATIENCE)
            page.goto(address)
            draws(page, out / name)
        window.close()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
