"""The chat page's built assets, which a machine without Node uses, match their source beside them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCE, DIST = ROOT / "web", ROOT / "deepseek" / "serve" / "web" / "dist"
IMPORT = re.compile(r"""(?:from|import) "(\.[^"]+)";""")


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def built(root: Path) -> dict[str, str]:
    found = {p.relative_to(root).as_posix(): sha(p) for p in root.rglob("*") if p.is_file()}
    return {name: digest for name, digest in found.items() if name != "manifest.json"}


def sources() -> dict[str, Path]:
    """Files the page is built from, by their path in ``web``; the shared ones as ``chat/finish.mjs`` names them."""
    script = (SOURCE / "chat" / "finish.mjs").read_text(encoding="utf-8")
    shared = json.loads(re.search(r"SHARED = (\[.*?\]);", script, re.S)[1])
    names = [f"src/{name}" for name in shared]
    names += ["build/manifest.mjs", "package.json", "package-lock.json", "tsconfig.json"]
    paths = [SOURCE / name for name in names] + [p for p in (SOURCE / "chat").rglob("*") if p.is_file()]
    return {p.relative_to(SOURCE).as_posix(): p for p in paths}


@pytest.fixture(scope="module")
def manifest() -> dict[str, object]:
    return json.loads((DIST / "manifest.json").read_text(encoding="utf-8"))


needs_source = pytest.mark.skipif(
    not SOURCE.is_dir(), reason="the page's source is not part of this distribution"
)


@needs_source
def test_assets_were_built_from_this_source(manifest: dict[str, object]) -> None:
    digest = hashlib.sha256()
    for name, path in sorted(sources().items()):
        digest.update(f"{name}\0{sha(path)}\n".encode())
    assert digest.hexdigest() == manifest["sources"], (
        "web/ changed since the build: run `npm ci && npm run build` in web/"
    )


@needs_source
def test_the_shared_files_are_all_named() -> None:
    """What the chat page imports from the monitor's source, directly or not, is in the digest."""
    known = sources()
    for path in known.values():
        if path.suffix not in (".ts", ".tsx") or path.name == "vite.config.ts":
            continue
        for name in IMPORT.findall(path.read_text(encoding="utf-8")):
            target = (path.parent / name).resolve()
            found = [target.with_name(target.name + end) for end in ("", ".ts", ".tsx")]
            assert any(p in known.values() for p in found), f"{path.name} imports {name}: add it to SHARED"


def test_no_asset_was_changed_by_hand(manifest: dict[str, object]) -> None:
    assert built(DIST) == manifest["files"]


@needs_source
def test_a_new_build_gives_the_same_files(tmp_path: Path, manifest: dict[str, object]) -> None:
    node, npx = shutil.which("node"), shutil.which("npx")
    if node is None or npx is None:
        pytest.skip("Node is absent; the digests above say the same")
    if not (SOURCE / "node_modules").is_dir():
        pytest.skip("web/node_modules is absent: run `npm ci` in web/ to have the page rebuilt here")
    target = str(tmp_path / "dist")
    build = [npx, "--no-install", "vite", "build", "--config", "chat/vite.config.ts", "--logLevel", "error"]
    subprocess.run([*build, "--outDir", target], cwd=SOURCE, check=True, timeout=300)
    subprocess.run([node, "chat/finish.mjs", "--to", target], cwd=SOURCE, check=True, timeout=60)
    assert built(tmp_path / "dist") == manifest["files"]


def test_the_page_is_small_and_asks_nobody_else() -> None:
    scripts = list(DIST.glob("*.js"))
    assert sum(p.stat().st_size for p in scripts) < 150_000
    for path in [*scripts, DIST / "page.css", DIST / "index.html"]:
        text = path.read_text(encoding="utf-8")
        hosts = set(re.findall(r"https?://([\w.-]+)", text)) - {"www.w3.org"}
        assert not hosts, f"{path.name} names {hosts}"
        assert "eval(" not in text
        assert "new Function" not in text
    html = (DIST / "index.html").read_text(encoding="utf-8")
    assert "<style" not in html, "the policy forbids inline code"
    assert not re.search(r"<script(?![^>]*\bsrc=)", html), "the policy forbids inline code"


@needs_source
def test_the_source_never_writes_html() -> None:
    """Preact itself can; the page must not: everything it shows is made of elements and text."""
    for path in (SOURCE / "chat" / "src").glob("*.ts*"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|dangerouslySet|insertAdjacentHTML|document\.write", text
        ), path


def test_foreign_parts_come_with_their_licences() -> None:
    assert "Permission is hereby granted" in (DIST / "LICENSE.preact").read_text(encoding="utf-8")
