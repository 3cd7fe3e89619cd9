"""The page's built assets, which a machine without Node uses, match their source beside them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCE, DIST = ROOT / "web", ROOT / "deepseek" / "monitor" / "web" / "dist"
SOURCES = (
    "src", "public", "build", "index.html", "package.json", "package-lock.json", "tsconfig.json", "vite.config.ts",
)  # fmt: skip


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files(root: Path, names: tuple[str, ...] = ("",)) -> dict[str, Path]:
    """Files below ``root/name`` by their path, in the order of the build's script."""
    found = [p for name in names for p in ([root / name, *(root / name).rglob("*")]) if p.is_file()]
    return {
        str(p.relative_to(root).as_posix()): p
        for p in sorted(set(found), key=lambda p: p.relative_to(root).as_posix())
    }


@pytest.fixture(scope="module")
def manifest() -> dict[str, object]:
    return json.loads((DIST / "manifest.json").read_text(encoding="utf-8"))


def test_assets_were_built_from_this_source(manifest: dict[str, object]) -> None:
    if not SOURCE.is_dir():
        pytest.skip("the page's source is not part of this distribution")
    digest = hashlib.sha256()
    for name, path in files(SOURCE, SOURCES).items():
        digest.update(f"{name}\0{sha(path)}\n".encode())
    assert digest.hexdigest() == manifest["sources"], (
        "web/ changed since the build: run `npm ci && npm run build` in web/"
    )


def test_no_asset_was_changed_by_hand(manifest: dict[str, object]) -> None:
    built = {name: sha(path) for name, path in files(DIST).items() if name != "manifest.json"}
    assert built == manifest["files"]


def test_a_new_build_gives_the_same_files(tmp_path: Path, manifest: dict[str, object]) -> None:
    node, npx = shutil.which("node"), shutil.which("npx")
    if node is None or npx is None:
        pytest.skip("Node is absent; the digests above say the same")
    if not (SOURCE / "node_modules").is_dir():
        pytest.skip("web/node_modules is absent: run `npm ci` in web/ to have the page rebuilt here")
    build = [npx, "--no-install", "vite", "build", "--logLevel", "error", "--outDir", str(tmp_path / "dist")]
    subprocess.run(build, cwd=SOURCE, check=True, timeout=300)
    subprocess.run(
        [node, "build/finish.mjs", "--to", str(tmp_path / "dist")], cwd=SOURCE, check=True, timeout=60
    )
    again = {name: sha(path) for name, path in files(tmp_path / "dist").items() if name != "manifest.json"}
    assert again == manifest["files"]


def test_the_page_is_small_and_asks_nobody_else() -> None:
    scripts = list(DIST.glob("*.js"))
    assert sum(p.stat().st_size for p in scripts) < 300_000
    for path in [*scripts, DIST / "page.css", DIST / "index.html"]:
        text = path.read_text(encoding="utf-8")
        hosts = set(re.findall(r"https?://([\w.-]+)", text)) - {"www.w3.org"}
        assert not hosts, f"{path.name} names {hosts}"
        assert "eval(" not in text
        assert "new Function" not in text
    html = (DIST / "index.html").read_text(encoding="utf-8")
    assert "<style" not in html, "the policy forbids inline code"
    assert not re.search(r"<script(?![^>]*\bsrc=)", html), "the policy forbids inline code"


def test_foreign_parts_come_with_their_licences() -> None:
    for name in ("speedscope/LICENSE", "LICENSE.preact", "LICENSE.uplot"):
        assert "Permission is hereby granted" in (DIST / name).read_text(encoding="utf-8")


def test_lockfile_names_no_registry() -> None:
    if not SOURCE.is_dir():
        pytest.skip("the page's source is not part of this distribution")
    lock = json.loads((SOURCE / "package-lock.json").read_text(encoding="utf-8"))
    assert [name for name, entry in lock["packages"].items() if "resolved" in entry] == []
    missing = [name for name, entry in lock["packages"].items() if name and "integrity" not in entry]
    assert missing == []
