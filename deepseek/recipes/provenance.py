"""Where every piece of a step's batch came from, of a run that trains or one that has ended.

The order of the data is a pure function of corpus, seed and shape, so nothing is recorded while training: the state of
the loader in the checkpoint before the step says it all. Without a checkpoint one counts from the beginning.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepseek.assemble import Run
from deepseek.config import replace
from deepseek.data import Corpus, Loader, prepare
from deepseek.data.loader import Sample, corpus_identity
from deepseek.data.quarantine import FILE as QUARANTINE
from deepseek.data.quarantine import read_quarantine
from deepseek.errors import DataError, DeepseekError, RunError
from deepseek.recipes.plan import PretrainConfig, read_config
from deepseek.recipes.rollback import skips_of
from deepseek.weights import checkpoint
from deepseek.weights.reader import step_of

EXCERPT = 240  #: characters of text told of a piece


@dataclass(frozen=True)
class PlacedSample:
    """A piece of a document in a step's batch.

    Attributes:
        row, column, length: positions ``[column, column + length)`` of row ``row`` of the global batch.
        source, path, offset: the document. start: the piece's first input in it, in tokens.
        loss: mean nats per target, where it was computed. text: what the piece begins with.
    """

    row: int
    column: int
    length: int
    source: str
    path: str
    offset: int
    start: int
    loss: float | None = None
    text: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def samples_of(run: Path | str, step: int, *, characters: int = EXCERPT) -> list[PlacedSample]:
    """Every piece of the batch that step ``step`` of a run trains on, row by row.

    It is the batch of the run as it went last: after a rollback, on its new way; without what was in quarantine then.

    Args:
        characters: of text told of each piece; 0: none.

    Raises:
        RunError: no such run or step. DataError: its corpus is no longer there, or has changed.
    """
    with open_data(Run.open(run).path, step) as held:
        return describe(held.loader.provenance(held.state, held.ahead), held.corpus, characters)


def describe(samples: Iterable[Sample], corpus: Corpus, characters: int = EXCERPT) -> list[PlacedSample]:
    """``samples`` with the text they begin with."""
    return [
        PlacedSample(
            s.row,
            s.column,
            s.length,
            s.source,
            s.path,
            s.offset,
            s.start,
            None,
            excerpt(s, corpus, characters),
        )
        for s in samples
    ]


def excerpt(sample: Sample, corpus: Corpus, characters: int = EXCERPT) -> str:
    """The beginning of a piece: the targets' text, decoded."""
    if characters < 1 or sample.document < 0:
        return ""
    stop = sample.start + 1 + min(sample.length, characters)  # a token is at least a byte, most are several
    ids = corpus.train.tokens(sample.document, sample.start + 1, stop)
    text = corpus.tokenizer.decode(ids)
    return text if len(text) <= characters else text[: characters - 1] + "…"


@dataclass(frozen=True)
class StepData:
    """The data of one step of a run, opened for looking at.

    The batch is ``loader.peek(state, ahead)``: ``ahead`` deliveries after a state of the loader.
    """

    config: PretrainConfig
    corpus: Corpus
    loader: Loader
    state: dict[str, Any]
    ahead: int

    def __enter__(self) -> StepData:
        return self

    def __exit__(self, *error: object) -> None:
        self.loader.close()


def open_data(
    run: Path, step: int, *, corpus: Corpus | None = None, rank: int = 0, world: int = 1
) -> StepData:
    """The data of ``step``, with nothing of the run touched.

    Raises:
        RunError: ``step`` is not a step of this run. DataError: the corpus is gone or has changed.
    """
    config = read_config(run / "config.toml")
    corpus = corpus or _corpus(run, config)
    quiet = replace(corpus.config, prefetch=0, seed=config.data.seed, quarantine=config.data.quarantine)
    corpus = dataclasses.replace(corpus, config=quiet)
    loader = corpus.loader(
        rows=_rows_of(run, step, config), length=config.train.length, rank=rank, world=world
    )
    loader.exclude([q for q in read_quarantine(run / QUARANTINE) if q.from_step <= step], missing_ok=True)
    loader.skip(skips_of(run))
    state, ahead = _place(run, step, loader)
    return StepData(config, corpus, loader, state, ahead)


def _place(run: Path, step: int, loader: Loader) -> tuple[dict[str, Any], int]:
    """A state of the loader before the batch of ``step``, and how many deliveries lie between. Reads no weights."""
    if step < 1:
        raise RunError(f"steps count from 1, there is no step {step}")
    for path in reversed(checkpoint.list_checkpoints(run)):
        if step_of(path) < step and isinstance(state := _state(path).get("loader"), dict):
            return state, step - step_of(path) - 1
    return loader.start(), step - 1


def _rows_of(run: Path, step: int, config: PretrainConfig) -> int:
    """Rows of the global batch of ``step``: as the checkpoint after it tells, for a resume may have changed them."""
    for path in checkpoint.list_checkpoints(run):
        if step_of(path) >= step:
            train = _state(path).get("config", {}).get("train", {})
            return int(train.get("batch_tokens", config.train.batch_tokens)) // config.train.length
    return config.train.batch_tokens // config.train.length


def _state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint; nothing of one that is damaged, or just being deleted."""
    try:
        return checkpoint.load(path, groups=()).state
    except DeepseekError:
        return {}


def _corpus(run: Path, config: PretrainConfig) -> Corpus:
    """The corpus that the run's checkpoints name; without one, the corpus of its config."""
    cache = Path(config.data.cache or run.parent / ".corpora").expanduser()
    wanted = _identity(run)
    if wanted is None:
        return prepare(config.data, cache)
    for report in sorted(cache.glob("*/corpus.json")):
        try:
            told = json.loads(report.read_text(encoding="utf-8"))
            if corpus_identity([told["splits"]["train"]["fingerprint"]]) == wanted:
                return Corpus.load(report.parent)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another version's, or half deleted: not ours
    raise DataError(
        f"the corpus that {run} was trained on is not in {cache}; restore it, or prepare it again from the same files"
    )


def _identity(run: Path) -> str | None:
    states = (_state(path).get("loader") for path in reversed(checkpoint.list_checkpoints(run)))
    return next((str(state["corpus"]) for state in states if isinstance(state, dict)), None)
