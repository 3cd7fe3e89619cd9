"""De-duplication against planted duplicates, with the true Jaccard similarity computed the plain way."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

from deepseek.data import DedupConfig, Deduplicator, Document, SourceConfig, open_source
from deepseek.data.dedup import bands_for
from deepseek.errors import ConfigError


def document(name: str, text: str) -> Document:
    return Document(text, "s", name, 0)


def jaccard(a: str, b: str, n: int = 5) -> float:
    """True similarity of the sets of word n-grams."""
    x, y = (
        {tuple(w[i : i + n]) for i in range(len(w) - n + 1)} for w in (a.lower().split(), b.lower().split())
    )
    return len(x & y) / len(x | y)


def corpus(count: int, words: int) -> list[str]:
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(2000)]
    return [" ".join(rng.choice(vocabulary) for _ in range(words)) for _ in range(count)]


def changed(text: str, changes: int, seed: int) -> str:
    rng, words = random.Random(seed), text.split()
    for i in rng.sample(range(len(words)), changes):
        words[i] = f"new{i}"
    return " ".join(words)


def test_exact_duplicates_name_the_one_that_is_kept() -> None:
    dedup = Deduplicator(DedupConfig())
    assert dedup.check(document("a", "Same  text\nhere")) is None
    assert dedup.check(document("b", "other text here")) is None
    found = dedup.check(document("c", "same text here\n"))
    assert found is not None
    assert (found.dropped, found.kept, found.kind, found.similarity) == ("s:c:0", "s:a:0", "exact", 1.0)
    assert dedup.summary()["counts"] == {"exact": 1}
    assert Deduplicator(DedupConfig(exact=False)).check(document("c", "x")) is None


def test_planted_near_duplicates_are_found_and_only_those() -> None:
    originals = corpus(120, 300)
    planted = {}
    texts = [(f"o{i}", t) for i, t in enumerate(originals)]
    for i, original in enumerate(originals[:60]):
        name, text = f"p{i}", changed(original, 1 + i % 12, seed=i)
        planted[name] = jaccard(original, text)
        texts.append((name, text))
    assert min(planted.values()) < 0.8 < max(planted.values())
    dedup = Deduplicator(DedupConfig(near=True))
    found = {d.dropped: d for d in (dedup.check(document(n, t)) for n, t in texts) if d is not None}
    assert set(found) == {f"s:{n}:0" for n, similarity in planted.items() if similarity >= 0.8}
    for name, similarity in planted.items():
        if similarity >= 0.8:
            hit = found[f"s:{name}:0"]
            assert hit.kept == f"s:o{name[1:]}:0"
            assert hit.similarity == pytest.approx(similarity)


def test_similarity_is_the_true_jaccard_on_real_files() -> None:
    files = {d.path: d.text for d in open_source(SourceConfig()) if d.path.startswith("encodings/cp")}
    dedup = Deduplicator(DedupConfig(near=True, threshold=0.6))
    found = [dedup.check(document(path, text)) for path, text in files.items()]
    hits = [d for d in found if d is not None]
    assert hits
    for hit in hits[:15]:
        a, b = (files[i.split(":")[1]] for i in (hit.dropped, hit.kept))
        assert hit.similarity == pytest.approx(jaccard(a, b))
    kept = [p for p, d in zip(files, found) if d is None]
    assert all(jaccard(files[a], files[b]) < 0.6 for a, b in combinations(kept[:25], 2))


def test_chinese_and_short_texts() -> None:
    dedup = Deduplicator(DedupConfig(near=True, exact=False))
    text = (
        "委员会星期二开会讨论新桥的建设方案这座桥已经计划了十多年"
        + "工程师说河面比旧地图上显示的更宽没有人反对"
    )
    assert dedup.check(document("a", text)) is None
    assert dedup.check(document("b", text + "。")) is not None
    assert dedup.check(document("c", "Hi")) is None
    assert dedup.check(document("d", "Ho")) is None
    assert dedup.check(document("e", "hi")) is not None


def test_sketches_do_not_depend_on_the_process(tmp_path: Path) -> None:
    code = (
        "import rensa\n"
        "m = rensa.RMinHash(16, 0); m.update(['a b', 'c d'])\n"
        "print(m.digest(), rensa.RMinHash.hash_token_sets([['a b']]))"
    )
    runs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(2)
    }
    assert len(runs) == 1
    assert runs != {""}


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.95])
def test_bands_miss_at_most_one_pair_in_a_thousand(threshold: float) -> None:
    bands = bands_for(threshold, 128)
    assert 1 - (1 - threshold ** (128 // bands)) ** bands >= 0.999


def test_impossible_options() -> None:
    with pytest.raises(ConfigError, match="threshold"):
        DedupConfig(threshold=1.5)
    with pytest.raises(ConfigError, match="power of two"):
        DedupConfig(permutations=100)
