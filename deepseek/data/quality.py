"""What the data that a run trains on are like, source by source, and whether they have changed.

Every batch adds its pieces (of this rank's rows) to a window per source. A piece is described by four figures: how
surprising its tokens are under the frequencies of the reference, how many of its neighbouring pairs the reference never
had, the entropy of its tokens, and the length of its document. The reference is the beginning of the run, or a sample
of the corpus (``learn_corpus``). From then on the window is compared with it by PSI and KS distance (``data.shift``),
against limits measured on the reference itself, drawn as the stream draws: of the documents that the reference was
packed and shuffled with while those last, then of others.

A document that took part in the tables of frequencies and pairs would look familiar for ever. So documents are in two
halves, by their number; each half has tables of its own and is judged by those of the other.

Everything is numpy over a whole batch; a comparison is made every ``every`` batches.

Shape letters: P pieces.
"""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deepseek.data.clean import language_identifier
from deepseek.data.loader import Delivery, Loader
from deepseek.data.pieces import FEATURES, PAIRS, Familiar, Fingerprints, Pieces
from deepseek.data.plan import WINDOW_ROWS
from deepseek.data.source_window import QualityConfig, SourceQuality, SourceWindow
from deepseek.errors import DataError, MissingExtraError
from deepseek.files import write_atomic

Array = npt.NDArray[Any]
SHORTEST = 16  #: targets that a piece must have to be described
LANGUAGES = 64  #: pieces, one a comparison, whose languages are remembered
MANY_EPOCHS = (
    8  #: of a source in rows that are shuffled together, after which one more or less does not matter
)
VERSION = 1


@dataclass(frozen=True)
class DriftAlert:
    """A source has changed.

    Attributes:
        batch: number of the batch at which it was found. psi, ks: of ``feature``; limit_*: what is natural.
        text: the finding in a sentence. documents: ``{source, path, offset, value}`` of the most foreign pieces.
    """

    batch: int
    source: str
    feature: str
    psi: float
    ks: float
    limit_psi: float
    limit_ks: float
    text: str
    documents: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Report:
    """A comparison: every source's figures, and the drifts found."""

    batch: int
    sources: dict[str, SourceQuality]
    alerts: list[DriftAlert]


class QualityMonitor:
    """Watches the deliveries of a loader.

    Args:
        decode: token ids to text; with it, and the package py3langid, languages are told.
    """

    def __init__(
        self,
        loader: Loader,
        config: QualityConfig | None = None,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.config = config or QualityConfig()
        self._stores, self._rank, self._world = loader.stores, loader.rank, loader.world
        self.names = list(dict.fromkeys(name for store in self._stores for name in store.sources))
        number = {name: i for i, name in enumerate(self.names)}
        self._source_of = [np.array([number[n] for n in store.sources]) for store in self._stores]
        vocab = self._stores[0].vocab_size
        self._familiar, self._settled = Familiar(vocab), False
        self._waiting: list[Pieces] = []
        self._length, self._tokens = loader.length, self._tokens_by_source()
        self._sources = [SourceWindow(self.config) for _ in self.names]
        self._fingerprints = Fingerprints(vocab)
        self._languages = _Languages.of(decode)
        self._batches = 0
        self._shuffled: int | None = (
            None  # the window of rows that the reference was taken from; -1: of several
        )

    @property
    def ready(self) -> bool:
        """Whether any source has its reference."""
        return any(source.reference is not None for source in self._sources)

    def update(self, delivery: Delivery) -> Report | None:
        """Look at a batch that was trained on; every ``every`` batches a comparison."""
        self._batches += 1
        if not self._settled:
            self._shuffled = delivery.window if self._shuffled in (None, delivery.window) else -1
        pieces = self._take(delivery)
        if pieces is None or self._batches % self.config.every:
            return None
        return self._report(delivery, pieces)

    def learn_corpus(self, loader: Loader, batches: int = 0) -> None:
        """Take the reference from batches of ``loader``, which should have another seed than the training's."""
        for _ in range(batches or self.config.reference):
            if next(loader, None) is None or loader.last is None:
                break
            if (pieces := self._pieces(loader.last)) is not None:
                self._learn(pieces)
        self._settle(least=2)
        self._batches, self._shuffled = self.config.reference, -1

    def _take(self, delivery: Delivery) -> Pieces | None:
        pieces = self._pieces(delivery)
        if pieces is None:
            return None
        self._count(pieces)
        if self._settled:
            self._describe(pieces)
        else:
            self._learn(pieces)
            if self._batches >= self.config.reference:
                self._settle(self.config.least)
        return pieces

    def _pieces(self, delivery: Delivery) -> Pieces | None:
        flat = [piece for row in delivery.rows[self._rank :: self._world] for piece in row]
        documents = delivery.batch.documents
        if not flat or documents is None:
            return None
        tokens = delivery.batch.targets.numpy()[documents.numpy() >= 0]
        store, document, start, length = np.array(flat, np.int64).T
        source = np.empty_like(store)
        for i, held in enumerate(self._stores):
            here = store == i
            source[here] = self._source_of[i][held.records["source"][document[here]]]
        first = np.concatenate([[0], np.cumsum(length)[:-1]])
        return Pieces(tokens, source, store, document, start, length, first)

    def _count(self, pieces: Pieces) -> None:
        """What is told of every piece: share, length, duplicates."""
        again = self._fingerprints(pieces)
        sizes = pieces.sizes(self._stores)
        for s in np.unique(pieces.source).tolist():
            here = pieces.source == s
            self._sources[s].add(int(pieces.length[here].sum()), sizes[here], again[here])

    def _learn(self, pieces: Pieces) -> None:
        self._familiar.learn(pieces)
        self._waiting.append(pieces)

    def _tokens_by_source(self) -> Array:
        """Tokens in the stores, of each source."""
        found = np.zeros(len(self.names))
        for held, source_of in zip(self._stores, self._source_of):
            if len(source_of) == 1:
                found[source_of[0]] += held.n_tokens
            else:
                sizes = np.bincount(held.records["source"], held.records["length"], minlength=len(source_of))
                np.add.at(found, source_of, sizes)
        return found

    def _pool(self, number: int) -> float:
        """Pieces of a source that are packed and shuffled together; ``inf`` where those are always all it has.

        Several sources have epochs that end within such rows: some documents are then in them once more than others.
        """
        source, total = self._sources[number], sum(s.all_tokens for s in self._sources)
        tokens = WINDOW_ROWS * self._length * source.all_tokens / max(total, 1)
        alone = source.all_tokens == total
        if self._tokens[number] * (1 if alone else MANY_EPOCHS) <= tokens:
            return float("inf")
        return tokens * source.all_pieces / max(source.all_tokens, 1)

    def _finish(self, number: int, least: int) -> None:
        source = self._sources[number]
        if source.reference is None:
            source.pool = self._pool(number)
            source.finish(least)

    def _settle(self, least: int) -> None:
        """The tables are done: describe what they were made of, which is the reference."""
        self._familiar.settle()
        self._settled = True
        waiting, self._waiting = self._waiting, []
        for pieces in waiting:
            self._describe(pieces, settle=False)
        for number in range(len(self._sources)):
            self._finish(number, least)

    def _describe(self, pieces: Pieces, settle: bool = True) -> None:
        """The figures of every piece that is long enough."""
        chosen = np.flatnonzero(pieces.length >= SHORTEST)
        if not len(chosen):
            return
        values = self._familiar.features(pieces, self._stores)[chosen]
        parts = np.maximum(1, np.ceil(pieces.sizes(self._stores) / self._length)).astype(np.int64)
        places = np.stack([pieces.store, pieces.document, parts], 1)[chosen]
        source = pieces.source[chosen]
        for s in np.unique(source).tolist():
            here = source == s
            self._sources[s].describe(values[here], places[here])
            if settle:
                self._finish(s, self.config.least)

    def _report(self, delivery: Delivery, pieces: Pieces) -> Report:
        total = sum(source.tokens for source in self._sources) or 1
        sources: dict[str, SourceQuality] = {}
        alerts: list[DriftAlert] = []
        for number, (name, source) in enumerate(zip(self.names, self._sources)):
            source.limits = source.near if delivery.window == self._shuffled else source.far
            if source.tokens:
                here = np.repeat(pieces.source == number, pieces.length)
                sources[name] = source.quality(total, pieces.tokens[here], self._language(number, pieces))
                if (found := source.drift()) is not None:
                    alerts.append(self._alert(delivery.number, name, source, *found))
            source.forget_period()
        return Report(delivery.number, sources, alerts)

    def _language(self, source: int, pieces: Pieces) -> float | None:
        if self._languages is None:
            return None
        longest = np.where(pieces.source == source, pieces.length, 0)
        piece = int(longest.argmax())
        if longest[piece] < SHORTEST:
            return self._languages.share(source)
        begin = int(pieces.first[piece])
        return self._languages.add(source, pieces.tokens[begin : begin + 256].tolist())

    def _alert(
        self, batch: int, name: str, source: SourceWindow, feature: int, psi: float, ks: float
    ) -> DriftAlert:
        assert source.limits is not None
        limit_psi, limit_ks = float(source.limits.psi[feature]), float(source.limits.ks[feature])
        foreign = [
            dict(zip(("source", "path", "offset"), self._stores[i].provenance(d)), value=value)
            for i, d, value in source.most_foreign(feature)
        ]
        what = FEATURES[feature]
        text = (
            f"source '{name}' has changed: {what}, PSI {psi:.2f} (at most {limit_psi:.2f} among healthy samples), "
            f"KS distance {ks:.2f} (at most {limit_ks:.2f}); "
            f"{source.beyond(feature):.0%} of its pieces lie where 2% did"
        )
        return DriftAlert(batch, name, what, psi, ks, limit_psi, limit_ks, text, foreign)

    def save(self, path: Path) -> None:
        """Keep the reference in a file (NumPy's ``.npz``), for ``load`` after a resume."""
        arrays: dict[str, Array] = {
            "version": np.array(VERSION),
            "shuffled": np.array(-1 if self._shuffled is None else self._shuffled),
            "counts": self._familiar.counts,
            "pairs": np.packbits(self._familiar.pairs),
            "stores": np.array([store.fingerprint for store in self._stores]),
        }
        for name, source in zip(self.names, self._sources):
            if source.reference is not None:
                arrays[f"values/{name}"], arrays[f"places/{name}"] = source.reference, source.places
                arrays[f"pool/{name}"] = np.array(source.pool)
        out = io.BytesIO()
        with zipfile.ZipFile(
            out, "w", zipfile.ZIP_DEFLATED, compresslevel=1
        ) as file:  # it is beside a run: be quick
            for name, array in arrays.items():
                with file.open(f"{name}.npy", "w") as entry:
                    np.lib.format.write_array(entry, array, allow_pickle=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, out.getvalue())

    def load(self, path: Path) -> None:
        """Take the reference from a file. Raises ``DataError`` where it is damaged, or of another corpus."""
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                held = dict(file)
            mine = [store.fingerprint for store in self._stores]
            if int(held["version"]) != VERSION or held["stores"].tolist() != mine:
                raise DataError(
                    f"{path} is the reference of another corpus or version; remove it to begin anew"
                )
            self._familiar.counts = held["counts"]
            self._familiar.pairs = np.unpackbits(held["pairs"]).astype(bool).reshape(2, PAIRS)
            self._shuffled = int(held["shuffled"])
            for name, source in zip(self.names, self._sources):
                if f"values/{name}" in held:
                    source.pool = float(held[f"pool/{name}"])
                    source.settle(held[f"values/{name}"], held[f"places/{name}"])
        except DataError:
            raise
        except Exception as error:  # zip files break in many ways
            raise DataError(f"{path} is damaged: {error!r}; remove it to begin anew") from None
        self._familiar.settle()
        self._settled, self._waiting, self._batches = True, [], self.config.reference


class _Languages:
    """The languages of pieces, one a comparison and source."""

    def __init__(self, tell: Callable[[str], str], decode: Callable[[list[int]], str]) -> None:
        self._tell, self._decode = tell, decode
        self._recent: dict[int, list[str]] = {}
        self._all: dict[int, Counter[str]] = {}

    @classmethod
    def of(cls, decode: Callable[[list[int]], str] | None) -> _Languages | None:
        try:
            return None if decode is None else cls(language_identifier(), decode)
        except MissingExtraError:
            return None

    def add(self, source: int, ids: list[int]) -> float | None:
        told = self._tell(self._decode(ids))
        recent = self._recent.setdefault(source, [])
        self._all.setdefault(source, Counter())[told] += 1
        recent.append(told)
        del recent[:-LANGUAGES]
        return self.share(source)

    def share(self, source: int) -> float | None:
        if not (recent := self._recent.get(source)):
            return None
        return recent.count(self._all[source].most_common(1)[0][0]) / len(recent)


__all__ = ["DriftAlert", "QualityConfig", "QualityMonitor", "Report", "SourceQuality"]
