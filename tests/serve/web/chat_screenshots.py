"""Draws the screenshots of docs/chat-page.md anew: ``python tests/serve/web/chat_screenshots.py [FOLDER [NAME …]]``.

The model in them is invented (``fake_chat_server``). Needs Chromium, and pngquant or Pillow to make
them small.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "monitor" / "web"))

from fake_chat_server import fake_chat_server
from page_browser import chromium, watched
from test_chat_page import ask, finished

IMAGES = Path(__file__).parents[3] / "docs" / "images"
LARGEST = 200_000
DESK = {"viewport": {"width": 1360, "height": 900}}
TALL = {"viewport": {"width": 1160, "height": 1180}}
PHONE = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}
QUESTION = "How does a router choose its experts?"
EARLIER = [
    "Compare global and sliding-window attention.",
    "Write a test for merging sorted lists.",
    "Why do experts stay unused?",
]


def answer(page: Any) -> None:
    ask(page, QUESTION)


def parameters(page: Any) -> None:
    ask(page, QUESTION)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Parameters").click()
    page.get_by_label("Preset", exact=True).select_option("Balanced")
    page.fill("#dial-seed", "7")
    page.fill("#dial-max_tokens", "400")


def tokens(view: str) -> Any:
    def show(page: Any) -> None:
        ask(page, QUESTION)
        page.get_by_role("button", name="Tokens").click()
        page.get_by_role("button", name="Answer again with token details").click()
        finished(page)
        page.get_by_role("button", name=view, exact=True).click()
        page.locator(".chips .chip").nth(8).hover()
        page.locator(".thread").evaluate("e => e.scrollTop = 80")

    return show


def lost(page: Any) -> None:
    page.fill(
        "#composer", "drop: What came before the connection broke stays, and the model can go on from there."
    )
    page.keyboard.press("Enter")
    page.wait_for_selector(".notice")
    ask(page, "busy")


def phone_tokens(page: Any) -> None:
    tokens("Experts")(page)
    page.locator(".thread").evaluate("e => e.scrollTop = 190")


#: name: theme, shape, what is done before the picture
SHOTS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "answer": ("dark", DESK, answer),
    "parameters": ("light", DESK, parameters),
    "experts": ("dark", TALL, tokens("Experts")),
    "branches": ("light", TALL, tokens("Global branch")),
    "probability": ("dark", DESK, tokens("Probability")),
    "errors": ("light", {"viewport": {"width": 1160, "height": 640}}, lost),
    "phone": ("dark", PHONE, answer),
    "phone-tokens": ("light", PHONE, phone_tokens),
}


def smaller(path: Path) -> None:
    """A palette instead of 24 bits a pixel."""
    if shutil.which("pngquant"):
        options = ["--force", "--skip-if-larger", "--strip", "--speed", "1", "--output", str(path)]
        subprocess.run(["pngquant", *options, "128", str(path)], check=False)
        return
    from PIL import Image

    with Image.open(path) as image:
        image.convert("RGB").quantize(192, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            path, optimize=True
        )


def main(folder: Path, only: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with fake_chat_server() as server, chromium() as browser:
        for name, (theme, shape, act) in SHOTS.items():
            if only and name not in only:
                continue
            server.state.__init__()
            with watched(browser, color_scheme=theme, **shape) as window:
                page = window.open(server.url, "select.model")
                if shape is not PHONE:
                    for text in EARLIER:
                        ask(page, text)
                        page.locator(".new").click()
                act(page)
                # Without a Chinese font the switch would be two boxes.
                page.evaluate("document.querySelector('.top .text-button').style.visibility = 'hidden'")
                page.wait_for_timeout(400)
                path = folder / f"chat-{name}.png"
                page.screenshot(path=str(path))
            smaller(path)
            size = path.stat().st_size
            print(f"{path.name}: {size / 1000:.0f} kB{' TOO LARGE' if size > LARGEST else ''}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES, sys.argv[2:])
