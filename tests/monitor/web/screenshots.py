"""Draws the screenshots of docs/monitor.md anew: ``python tests/monitor/web/screenshots.py [FOLDER]``.

The runs in them are invented (``fake_server``): a 3B model that nobody here could train, with one fault of each kind.
Needs Chromium, and pngquant (a Debian package) to make the pictures small.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from fake_series import series
from fake_server import fake_server
from page_browser import chromium, watched

IMAGES = Path(__file__).parents[3] / "docs" / "images"
RUN = "run/moe-3b-hybrid"
LARGEST = 200_000
DESK = {"viewport": {"width": 1360, "height": 850}}
PHONE = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}
#: name: theme, shape, address, height of the picture (0: the whole page)
SHOTS: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "runs": ("dark", DESK, "", 620),
    "run": ("dark", DESK, RUN, 1180),
    "run-light": ("light", DESK, RUN, 1180),
    "incident": ("dark", DESK, f"{RUN}/incidents/3", 1640),
    "incident-light": ("light", DESK, f"{RUN}/incidents/3", 1100),
    "incidents": ("light", DESK, f"{RUN}/incidents", 520),
    "experts": ("dark", DESK, f"{RUN}/experts", 1080),
    "data": ("light", DESK, f"{RUN}/data", 900),
    "precision": ("dark", DESK, f"{RUN}/precision", 860),
    "lineage": ("light", DESK, f"{RUN}/lineage", 760),
    "inspector": ("dark", DESK, f"{RUN}/inspect?head=6.3", 1200),
    "inspector-light": ("light", DESK, f"{RUN}/inspect?head=6.3", 1200),
    "compare": (
        "dark",
        DESK,
        f"compare?{'&'.join(f'run=sweep~lr-{x}' for x in ('1e-4', '2e-4', '4e-4'))}",
        1000,
    ),
    "phone": ("dark", PHONE, RUN, 844),
    "phone-incident": ("light", PHONE, f"{RUN}/incidents/3", 844),
}


def main(folder: Path, only: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    series()  # invented once, before the first picture
    with fake_server() as server, chromium() as browser:
        for name, (theme, shape, address, height) in SHOTS.items():
            if only and name not in only:
                continue
            with watched(browser, color_scheme=theme, **shape) as window:
                page = window.open(f"{server.url}#/{address}")
                size = {"width": shape["viewport"]["width"], "height": height}
                page.set_viewport_size(size)
                page.wait_for_timeout(500)
                window.settle()
                page.wait_for_timeout(700)
                path = folder / f"monitor-{name}.png"
                page.screenshot(path=str(path))
            if shutil.which("pngquant"):
                command = [
                    "pngquant",
                    "--force",
                    "--skip-if-larger",
                    "--strip",
                    "--speed",
                    "1",
                    "--output",
                    str(path),
                    "128",
                    str(path),
                ]
                subprocess.run(command, check=False)
            print(
                f"{path.name}: {path.stat().st_size / 1000:.0f} kB"
                + (" TOO LARGE" if path.stat().st_size > LARGEST else "")
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES, sys.argv[2:])
