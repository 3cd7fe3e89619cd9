"""The corpus of the studies: the Python standard library and the documentation packages of Debian, tokenised once.

Documentation is prose and code in about equal parts, free to read, and large enough for minutes of training on
one GPU; every Debian machine can have it. A package that is installed is read where it lies; of one that is not,
``apt-get download`` fetches the archive and ``dpkg-deb`` unpacks it below ``--work``; nothing is installed. HTML
becomes text, lines that many pages of one package share (menus, footers) go, and no package may give more than
its cap. Our own data path then drops duplicates, exact and near, trains the tokenizer, holds 1.5% of the documents
out, and the tokens are written as ``deepseek.bench.tokens`` reads them: files small enough to carry about.

    python benchmarks/corpus_debian.py --out .corpus

Takes about ten minutes on two cores, 4 GB below ``--work`` and 40 MB below ``--out``. The packages are those of
Debian 12; one that a later release calls otherwise is left out with a warning, so that corpora of two releases
differ: compare runs on the same files only.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from deepseek.bench.tokens import write_tokens
from deepseek.data import DataConfig, SourceConfig, prepare
from deepseek.data.clean import CleanConfig
from deepseek.data.dedup import DedupConfig

MB = 10**6


@dataclass(frozen=True)
class Package:
    """A Debian package, the most text taken from it, and which of its files: paths that match ``keep`` but not
    ``drop``.
    """

    name: str
    cap: float = 8.0  # MB of text
    keep: str = ""
    drop: str = r"^$"


PACKAGES = (
    Package("python3.11-doc", 14),
    Package("linux-doc-6.1", 45, keep=r"/Documentation/"),
    Package("perl-doc", 9, keep=r"\.pod$"),
    Package("debian-reference-en"),
    Package("postgresql-doc-15", 10),
    Package("libboost1.74-doc", 16),
    Package("git-doc", keep=r"\.txt$"),
    Package("r-doc-html"),
    Package("octave-doc"),
    Package("sqlite3-doc", 10),
    Package("apache2-doc", keep="/manual/en/"),
    Package("debian-policy", keep=r"\.html$"),
    Package("debian-handbook", keep="/html/en-US/"),
    Package("debian-faq"),
    Package("developers-reference", keep=r"\.html$"),
    Package("harden-doc", keep="/html/en"),
    Package("anarchism", 12, keep="/html/"),
    Package("dict-gcide", 16),
    Package("dict-foldoc", 8),
    Package("dict-jargon", 8),
    Package("vim-doc", 10),
    Package("zsh-doc"),
    Package(
        "rust-doc", 24, keep="/html/(src|book|reference|nomicon|rustc|rustdoc|embedded-book|std|rust-by)",
        drop="/std/(arch|primitive|simd)",
    ),
    Package("python-scipy-doc", 12),
    Package("python-sympy-doc", 10),
    Package("python-django-doc", 12),
    Package("python-sqlalchemy-doc", 10),
    Package("python-pandas-doc", 10, drop="/generated/"),
    Package("nodejs-doc", keep=r"\.html$"),
    Package("cmake-doc", 6, keep=r"\.html$"),
    Package("llvm-14-doc", 10),
    Package("clang-14-doc"),
    Package("racket-doc", 12),
    Package("erlang-doc", 12, drop="/wx-|/java/"),
    Package("lilypond-doc-html", 6, drop=r"\.[a-z]{2}\.html$|/internals/"),
    Package("python-sklearn-doc", 10),
    Package("python-statsmodels-doc", 10, drop="/generated/"),
    Package("python-astropy-doc", 10),
    Package("qtbase5-doc-html", 12),
    Package("postfix-doc"),
    Package("exim4-doc-html"),
    Package("libgtk-3-doc"),
    Package("sphinx-doc", 4),
    Package("docutils-doc", 4, keep=r"\.txt$"),
    Package("gimp-help-en"),
    Package("twisted-doc", 8),
    Package("maxima-doc", 4),
)  # fmt: skip

TEXT = re.compile(r"\.(html?|txt|rst|pod|md|py|[ch]pp|texi|dict\.dz)(\.gz)?$")
NOWHERE = re.compile(
    r"/_(sources|static|downloads|images)/|/(changelog|copyright|NEWS|genindex|py-modindex|search)[^/]*$"
    r"|/man/|-members\.html$|/LICENSE"
)
PIECE = 60_000  #: characters of a document; larger files are cut at blank lines


def fetch(package: Package, work: Path) -> list[Path]:
    """The text files of a package, installed or unpacked below ``work``."""
    listed = subprocess.run(["dpkg-query", "-L", package.name], capture_output=True, text=True)
    if listed.returncode == 0:
        files = [Path(line) for line in listed.stdout.splitlines()]
        root = Path("/")
    else:
        root = work / "unpacked" / package.name
        if not root.is_dir():
            debs = work / "debs"
            debs.mkdir(parents=True, exist_ok=True)
            found = sorted(debs.glob(f"{package.name}_*.deb"))
            if not found:
                subprocess.run(["apt-get", "download", package.name], cwd=debs, capture_output=True)
                found = sorted(debs.glob(f"{package.name}_*.deb"))
            if not found:
                print(f"warning: no package {package.name} here; left out", file=sys.stderr)
                return []
            partial_root = root.with_name(f".{root.name}.partial")
            partial_root.mkdir(parents=True, exist_ok=True)
            subprocess.run(["dpkg-deb", "-x", str(found[0]), str(partial_root)], check=True)
            partial_root.rename(root)
        files = list(root.rglob("*"))
    wanted = []
    for path in files:
        name = "/" + path.relative_to(root).as_posix()
        chosen = re.search(package.keep, name) and not re.search(package.drop, name)
        if (
            chosen
            and TEXT.search(name)
            and not NOWHERE.search(name)
            and path.is_file()
            and not path.is_symlink()
        ):
            wanted.append(path)
    return sorted(wanted, key=lambda p: hashlib.blake2b(p.relative_to(root).as_posix().encode()).digest())


_TAG = re.compile(r"<!--.*?-->|<[!?][^>]*>|<(/?)([a-zA-Z][a-zA-Z0-9]*)([^<>]*)>", re.DOTALL)
_VOID = {
    "img", "input", "link", "meta", "hr", "br", "col", "area", "base", "source", "wbr",
}  # fmt: skip
_SKIP_TAGS = {
    "head", "script", "style", "nav", "header", "footer", "aside", "svg", "button", "form", "select", "math",
}  # fmt: skip
_SKIP_KINDS = re.compile(
    r"""(class|role|id)=["'][^"']*(navigation|sphinxsidebar|related|nav(header|footer|bar)|bd-(sidebar|toc)|toc-item"""
    r"""|headerlink|breadcrumb|line-?no|line-numbers|tocset|sidebar|footer|permalink|navset|copybutton)"""
)
_BLOCK = {
    "p", "div", "section", "article", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "blockquote", "ul", "ol", "dl",
    "table", "tr",
}  # fmt: skip
_LINE = {
    "li", "dt", "dd",
}  # fmt: skip


def html_text(page: str) -> str:
    """What a reader of the page sees, less menus; the layout of ``<pre>`` is kept."""
    out: list[str] = []
    at, skip, depth, pre = 0, "", 0, 0
    for tag in _TAG.finditer(page):
        if not skip and tag.start() > at:
            part = html.unescape(page[at : tag.start()])
            out.append(part if pre else re.sub(r"\s+", " ", part))
        at = tag.end()
        name = (tag[2] or "").lower()
        closing = tag[1] == "/"
        if not name or (tag[3].endswith("/") and name not in _VOID):
            continue
        if skip:
            if name == skip:
                depth += -1 if closing else 1
                skip = skip if depth else ""
        elif name in _VOID:
            out.append("\n" if name in ("br", "hr") else "")
        elif (
            not closing
            and (name in _SKIP_TAGS or _SKIP_KINDS.search(tag[3]))
            and name not in ("body", "html")
        ):
            skip, depth = name, 1
        elif name == "pre":
            pre = 0 if closing else 1
            out.append("\n\n")
        elif name in _BLOCK:
            out.append("\n" if name == "tr" else "\n\n")
        elif name in _LINE and not closing:
            out.append("\n- " if name == "li" else "\n")
        elif (name in ("td", "th") and closing) or "classifier" in tag[3]:
            out.append("  ")
    return "".join(out)


def read(path: Path) -> str:
    """The text of a file, unpacked and freed of its markup."""
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    if re.search(r"\.html?(\.gz)?$", path.name):
        text = html_text(text)
    lines = (line.rstrip() for line in text.replace("\xa0", " ").replace("\xb6", "").splitlines())
    text = "\n".join(line for line in lines if line != "-")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def pieces(text: str) -> Iterator[str]:
    """``text`` cut at blank lines into pieces of about ``PIECE`` characters."""
    while len(text) > 1.5 * PIECE:
        cut = text.find("\n\n", PIECE)
        if cut < 0:
            break
        yield text[: cut + 1]
        text = text[cut + 2 :]
    yield text


def without_shared_lines(texts: list[str]) -> list[str]:
    """Drop the lines that a fifth of the pages, and at least 20, have in common."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update({line for line in text.splitlines() if len(line.strip()) > 3})
    shared = {line for line, n in counts.items() if n >= max(20, 0.2 * len(texts))}
    return ["\n".join(x for x in t.splitlines() if x not in shared).strip("\n") + "\n" for t in texts]


def extract(package: Package, work: Path) -> tuple[str, int, int]:
    """Write the documents of a package below ``work/text``; its name, their number and their bytes."""
    folder = work / "text" / package.name
    if (folder / "done").is_file():
        count, size = json.loads((folder / "done").read_text())
        return package.name, count, size
    texts, size = [], 0
    for path in fetch(package, work):
        text = read(path)
        texts.append(text)
        size += len(text)
        if size > 1.3 * package.cap * MB:  # shared lines and duplicates are still to go
            break
    folder.mkdir(parents=True, exist_ok=True)
    count = size = 0
    for text in without_shared_lines(texts):
        for piece in pieces(text):
            if len(piece) >= 400 and size < package.cap * MB:
                (folder / f"{count:05d}.txt").write_text(piece, encoding="utf-8")
                count, size = count + 1, size + len(piece.encode())
    if count:  # a package that could not be had is tried again next time
        (folder / "done").write_text(json.dumps([count, size]))
    return package.name, count, size


def corpus_config(work: Path, sizes: dict[str, int], vocab: int) -> DataConfig:
    """One source per package, weighted by its size; the standard library beside them."""
    packages = [
        SourceConfig(
            kind="text", path=str(work / "text" / name), name=name, pattern="*.txt", split="file", weight=size / MB
        )
        for name, size in sizes.items()
        if size
    ]  # fmt: skip
    return DataConfig(
        sources=(SourceConfig(kind="stdlib", weight=9.0), *packages),
        vocab_size=vocab,
        train_bytes=16 * MB,
        held_out=0.015,
        clean=CleanConfig(
            min_words=60, min_alphanumeric=0.35, max_duplicate_line_chars=0.6, max_top_4gram=0.4
        ),
        dedup=DedupConfig(near=True, threshold=0.7, permutations=64),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(".corpus"))
    parser.add_argument(
        "--work", type=Path, default=Path("runs/.corpus_debian"), help="archives and text on the way"
    )
    parser.add_argument("--vocab", type=int, default=16_384)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument(
        "--megabytes", type=float, default=40.0, help="of compressed training tokens, at most"
    )
    options = parser.parse_args()
    began = time.perf_counter()
    with ProcessPoolExecutor(options.workers) as pool:
        found = list(pool.map(partial(extract, work=options.work), PACKAGES))
    for name, count, size in found:
        print(f"{name:24s} {count:6d} documents {size / MB:7.2f} MB", flush=True)
    print(
        f"{sum(s for *_, s in found) / MB:.1f} MB of text after {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    config = corpus_config(options.work, {name: size for name, _, size in found}, options.vocab)
    corpus = prepare(config, options.work / "prepared")
    print(f"{corpus.train.n_tokens:,} training tokens after {time.perf_counter() - began:.0f} s", flush=True)
    report = write_tokens(corpus, options.out, int(options.megabytes * MB))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
