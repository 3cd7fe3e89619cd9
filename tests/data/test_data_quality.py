"""The quality monitor on the standard library: a fifth of noise is found, healthy streams are left alone."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepseek.config import replace
from deepseek.data import Corpus, DataConfig, Loader, SourceConfig, StoreWriter, TokenStore, prepare
from deepseek.data.loader import Delivery
from deepseek.data.pieces import BUCKETS, Familiar
from deepseek.data.quality import QualityConfig, QualityMonitor, Report
from deepseek.errors import ConfigError, DataError

ROWS, LENGTH, BEGIN = 16, 256, 70


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    config = DataConfig(vocab_size=1024, train_bytes=300_000)
    return prepare(config, tmp_path_factory.mktemp("quality") / "cache")


def deliveries(corpus: Corpus, batches: int, seed: int = 0) -> Iterator[tuple[Loader, Delivery]]:
    loader = Loader(corpus.train, rows=ROWS, length=LENGTH, seed=seed, prefetch=0)
    for _ in range(batches):
        next(loader)
        assert loader.last is not None
        yield loader, loader.last


def watch(
    corpus: Corpus, batches: int, seed: int = 0, spoil: Callable[[np.ndarray[Any, Any]], Any] | None = None
) -> tuple[list[Report], QualityMonitor]:
    """Reports over a stream; from batch ``BEGIN`` on a fifth of the documents is spoilt."""
    reports, monitor = [], None
    for loader, delivery in deliveries(corpus, batches, seed):
        monitor = monitor or QualityMonitor(loader)
        if spoil is not None and delivery.number >= BEGIN:
            delivery = spoilt(delivery, spoil)
        if (report := monitor.update(delivery)) is not None:
            reports.append(report)
    assert monitor is not None
    return reports, monitor


def spoilt(delivery: Delivery, spoil: Callable[[np.ndarray[Any, Any]], Any]) -> Delivery:
    targets = delivery.batch.targets.clone()
    for r, row in enumerate(delivery.rows):
        at = 0
        for piece in row:
            if piece.document % 5 == 0:
                here = targets[r, at : at + piece.length]
                here.copy_(torch.from_numpy(np.resize(spoil(here.numpy()), piece.length).astype(np.int64)))
            at += piece.length
    return delivery._replace(batch=dataclasses.replace(delivery.batch, targets=targets))


def noise(kind: str, corpus: Corpus) -> Callable[[np.ndarray[Any, Any]], Any]:
    draw = np.random.default_rng(0)
    encode = corpus.tokenizer.encode
    bytes_ = encode("".join(map(chr, draw.integers(33, 255, 20_000))))
    words = ["class", "self", "return", "import", "none"]
    kinds: dict[str, Callable[[np.ndarray[Any, Any]], Any]] = {
        "tokens": lambda ids: draw.integers(0, 1024, len(ids)),
        "bytes": lambda ids: np.roll(bytes_, draw.integers(1000)),
        "shuffled": lambda ids: draw.permutation(ids),
        "repeated": lambda ids: encode(" ".join(draw.choice(words, 40))),
    }
    return kinds[kind]


@pytest.mark.parametrize("kind", ["tokens", "bytes", "shuffled", "repeated"])
def test_a_fifth_of_noise_is_told_within_200_batches(corpus: Corpus, kind: str) -> None:
    reports, _ = watch(corpus, BEGIN + 200, seed=1, spoil=noise(kind, corpus))
    alerts = [alert for report in reports for alert in report.alerts]
    assert alerts
    assert BEGIN < alerts[0].batch < BEGIN + 200
    assert alerts[0].source == "stdlib"
    assert alerts[0].feature in ("surprise", "novel pairs", "token entropy")
    number = {corpus.train.provenance(d): d for d in range(len(corpus.train))}
    named = [number[d["source"], d["path"], d["offset"]] for d in alerts[0].documents]
    assert sum(d % 5 == 0 for d in named) >= 4  # the documents it names are the noise
    assert [r.sources["stdlib"].psi is None for r in reports[:6]] == [True] * 6  # no reference yet


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_healthy_streams_are_left_alone(corpus: Corpus, seed: int) -> None:
    """Through more than two epochs."""
    reports, monitor = watch(corpus, 600, seed)
    assert monitor.ready
    told = [r.sources["stdlib"] for r in reports]
    assert sum(q.psi is not None for q in told) > 40
    assert [alert for r in reports for alert in r.alerts] == []
    assert max(q.psi or 0.0 for q in told) < 0.25
    assert {q.share for q in told} == {1.0}
    assert all(q.duplicates < 0.15 for q in told)  # the same piece in the next epoch is no duplicate


def test_the_figures_of_pieces_are_those_of_plain_python(corpus: Corpus) -> None:
    stream = list(deliveries(corpus, 9))
    monitor = QualityMonitor(stream[0][0])
    tables = Familiar(1024)
    texts: tuple[list[list[int]], list[list[int]]] = [], []
    for _, delivery in stream[:8]:
        pieces = monitor._pieces(delivery)
        assert pieces is not None
        tables.learn(pieces)
        for i, half in enumerate(pieces.half.tolist()):
            begin = int(pieces.first[i])
            texts[half].append(pieces.tokens[begin : begin + int(pieces.length[i])].tolist())
    tables.settle()
    counts = [Counter(t for text in texts[h] for t in text) for h in (0, 1)]
    pairs = [{pair for text in texts[h] for pair in pairwise(text)} for h in (0, 1)]
    pieces = monitor._pieces(stream[8][1])
    assert pieces is not None
    found = tables.features(pieces, [corpus.train])
    row = 0
    for r, planned in enumerate(stream[8][1].rows):
        column = 0
        for piece in planned:
            ids = stream[8][1].batch.targets[r, column : column + piece.length].tolist()
            other = 1 - int(pieces.half[row])
            total = counts[other].total() + 0.5 * 1024
            surprise = sum(math.log2(total / (counts[other][t] + 0.5)) for t in ids) / len(ids)
            assert found[row, 0] == pytest.approx(surprise, rel=1e-5)
            new = [pair not in pairs[other] for pair in pairwise(ids)]
            novel = sum(new) / max(len(new), 1)
            assert found[row, 1] == pytest.approx(novel, abs=0.03)  # pairs share bits of the table
            buckets = Counter(t % BUCKETS for t in ids)
            entropy = -sum(c / len(ids) * math.log2(c / len(ids)) for c in buckets.values())
            assert found[row, 2] == pytest.approx(entropy, abs=1e-9)
            assert found[row, 3] == pytest.approx(math.log2(len(corpus.train.tokens(piece.document))))
            row, column = row + 1, column + piece.length
    assert row == len(found)


def test_shares_lengths_entropy_and_duplicates_of_each_source(tmp_path: Path) -> None:
    """Source 'a' repeats ten documents under other names; 'b' never does, and is three times as long."""
    draw = np.random.default_rng(0)
    texts = [draw.integers(2, 500, 60) for _ in range(10)]
    with StoreWriter(
        tmp_path / "s", vocab_size=512, eos_id=0, pad_id=1, tokenizer="t", sources=["a", "b"]
    ) as out:
        for i in range(400):
            out.add(texts[i % 10], 60, source=0, path=f"a{i}")
            out.add(draw.integers(2, 4, 180), 180, source=1, path=f"b{i}")
    loader = Loader(TokenStore(tmp_path / "s"), rows=8, length=181, weights={"a": 1.0, "b": 3.0}, prefetch=0)
    monitor = QualityMonitor(loader, QualityConfig(every=20))
    reports = []
    for _ in range(40):
        next(loader)
        assert loader.last is not None
        reports += [r] if (r := monitor.update(loader.last)) else []
    told = reports[1].sources
    assert told["a"].share == pytest.approx(0.25, abs=0.05)
    assert told["a"].share + told["b"].share == pytest.approx(1.0)
    assert (told["a"].length, told["b"].length) == (61.0, 181.0)
    assert told["a"].duplicates > 0.9
    assert told["b"].duplicates == 0.0
    assert told["b"].entropy == pytest.approx(1.0, abs=0.1)
    assert 6 < told["a"].entropy < math.log2(500)


def test_a_drift_is_told_of_the_source_that_has_it(tmp_path: Path) -> None:
    """Two sources, more than is packed and shuffled together; half of the smaller one's stream, then noise in it."""
    draw = np.random.default_rng(0)
    words = [draw.zipf(1.5, 4000) % 500 + 2, draw.zipf(1.3, 4000) % 500 + 2]
    with StoreWriter(
        tmp_path / "s", vocab_size=512, eos_id=0, pad_id=1, tokenizer="t", sources=["a", "b"]
    ) as out:
        for i in range(24_000):
            source = int(i % 4 == 0)
            begin, size = draw.integers(3000), draw.integers(40, 400)
            out.add(words[source][begin : begin + size], int(size), source=source, path=f"{i}")
    store = TokenStore(tmp_path / "s")
    loader = Loader(store, rows=8, length=64, weights={"a": 3.0, "b": 1.0}, prefetch=0)
    monitor = QualityMonitor(loader, QualityConfig(window=256))
    alerts: list[Any] = []
    number = 0
    while not alerts and number < 2600:
        next(loader)
        assert loader.last is not None
        delivery, number = loader.last, number + 1
        if number > 2400:  # by then the rows come from another window
            assert delivery.window > 0
            targets = delivery.batch.targets.clone()
            for r, row in enumerate(delivery.rows):
                at = 0
                for piece in row:
                    if store.records["source"][piece.document] == 1 and piece.document % 5 == 0:
                        noise = draw.integers(2, 512, piece.length)
                        targets[r, at : at + piece.length] = torch.from_numpy(noise)
                    at += piece.length
            delivery = delivery._replace(batch=dataclasses.replace(delivery.batch, targets=targets))
        if (report := monitor.update(delivery)) is not None:
            alerts += report.alerts
    assert [a.source for a in alerts] == ["b"]
    assert alerts[0].batch > 2400


def test_a_reference_is_kept_over_a_resume_and_refused_for_another_corpus(
    corpus: Corpus, tmp_path: Path
) -> None:
    _, monitor = watch(corpus, 70)
    monitor.save(tmp_path / "run" / "quality.npz")
    stream = [(loader, delivery) for loader, delivery in deliveries(corpus, 160, seed=3)][70:]
    resumed = QualityMonitor(stream[0][0])
    assert QualityMonitor(stream[0][0]).ready is False
    resumed.load(tmp_path / "run" / "quality.npz")
    assert resumed.ready
    before = [r for _, delivery in stream if (r := monitor.update(delivery)) is not None]
    after = [r for _, delivery in stream if (r := resumed.update(delivery)) is not None]
    assert after[-1].sources["stdlib"].psi is not None
    assert after[-1].sources["stdlib"].psi == pytest.approx(before[-1].sources["stdlib"].psi, abs=0.05)

    (tmp_path / "damaged").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(DataError, match="is damaged"):
        resumed.load(tmp_path / "damaged")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("words and words " * 200)
    other_config = DataConfig(
        sources=(SourceConfig(kind="text", path=str(tmp_path / "text")),), vocab_size=300, held_out=0.0
    )
    small = prepare(other_config, tmp_path / "cache")
    other = QualityMonitor(small.loader(rows=1, length=8))
    with pytest.raises(DataError, match="of another corpus"):
        other.load(tmp_path / "run" / "quality.npz")


def test_a_reference_may_come_from_the_corpus(corpus: Corpus) -> None:
    stream = deliveries(corpus, 60, seed=5)
    loader, delivery = next(stream)
    monitor = QualityMonitor(loader)
    monitor.learn_corpus(Loader(corpus.train, rows=ROWS, length=LENGTH, seed=99, prefetch=0))
    assert monitor.ready
    reports = [monitor.update(delivery), *(monitor.update(d) for _, d in stream)]
    told = [r for r in reports if r]
    assert told[-1].sources["stdlib"].psi is not None
    assert [r.alerts for r in told] == [[]] * len(told)


def test_languages_are_told_where_the_package_is(corpus: Corpus) -> None:
    pytest.importorskip("py3langid")
    loader = Loader(corpus.train, rows=4, length=LENGTH, prefetch=0)
    monitor = QualityMonitor(loader, QualityConfig(every=2), decode=corpus.tokenizer.decode)
    shares = []
    for _ in range(20):
        next(loader)
        assert loader.last is not None
        if (report := monitor.update(loader.last)) is not None:
            shares.append(report.sources["stdlib"].language)
    assert all(s is not None and 0 < s <= 1 for s in shares)


def test_settings_that_cannot_be_used_are_refused() -> None:
    for changes in ({"window": 0}, {"psi": 0.0}, {"margin": 0.5}, {"reference": 1}):
        with pytest.raises(ConfigError, match="quality"):
            replace(QualityConfig(), **changes)
