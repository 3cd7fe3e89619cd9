"""What a model is looked at with: a batch of held-out text, the same one every time.

For a run it comes from the run's own corpus, and for a bare model directory from a file that the user names, or from
the Python standard library's sources, which every machine has.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from deepseek.assemble import Loaded, Run
from deepseek.batch import Batch
from deepseek.config import from_dict, load_toml
from deepseek.data import Corpus, Tokenizer, prepare
from deepseek.data.corpus import DataConfig
from deepseek.errors import DataError, RunError
from deepseek.models import ModelConfig

TOKENS = 4096  #: positions a model is looked at with, unless told
LONG = 8192  #: positions of the row that attention maps show, at most
LENGTH = 512  #: positions of a row, unless the model or the run is shorter


@dataclass(frozen=True)
class HeldOut:
    """A batch, the tokenizer that reads it, and where its text comes from, in words."""

    batch: Batch
    tokenizer: Tokenizer | None
    source: str


def held_out(
    loaded: Loaded, text: Path | str | None = None, tokens: int = TOKENS, length: int = 0
) -> HeldOut:
    """About ``tokens`` positions of text that the model was not trained on, as far as that is known.

    Args:
        text: a UTF-8 file to use instead of the run's corpus.
        length: positions of a row; 0: the run's own, at most ``LENGTH``.

    Raises:
        DataError: the file is empty, the directory has no tokenizer, or the corpus has changed since training.
    """
    is_run = (loaded.path / "config.toml").is_file()
    length = length or row_length(loaded.path if is_run else None, loaded.model.config)
    rows = max(1, tokens // length)
    if text is not None:
        return HeldOut(text_batch(loaded, read_text(Path(text)), rows, length), loaded.tokenizer, str(text))
    if is_run and (found := _from_corpus(loaded, rows, length)) is not None:
        return found
    source = "the Python standard library's sources"
    return HeldOut(text_batch(loaded, _standard_library(), rows, length), loaded.tokenizer, source)


def row_length(run: Path | None, config: ModelConfig) -> int:
    """The length of the rows that the run was trained on, at most ``LENGTH``."""
    trained = LENGTH
    if run is not None:
        table = load_toml(run / "config.toml").get("train")
        found = table.get("length") if isinstance(table, dict) else None
        trained = found if isinstance(found, int) else LENGTH
    return max(2, min(trained, LENGTH, config.max_length))


def _from_corpus(loaded: Loaded, rows: int, length: int) -> HeldOut | None:
    """The first held-out rows of the run's corpus; ``None`` when it holds none out."""
    corpus = _corpus(loaded)
    if corpus.held_out is None:
        return None
    batch = next(iter(corpus.eval_batches(rows=rows, length=length)), None)
    return None if batch is None else HeldOut(batch, corpus.tokenizer, "the run's held-out documents")


def _corpus(loaded: Loaded) -> Corpus:
    """The run's corpus, found again. Raises ``DataError`` when it is not the one the model was trained on."""
    run = Run.open(loaded.path)
    table = load_toml(run.config_path).get("data")
    config = from_dict(DataConfig, table if isinstance(table, dict) else {}, "data")
    corpus = prepare(config, config.cache or run.path.parent / ".corpora")
    if loaded.tokenizer is None or loaded.tokenizer.fingerprint != corpus.tokenizer.fingerprint:
        raise DataError(
            f"the corpus of {run.path} has changed: its tokenizer is not the one that the model was trained with; "
            "restore the files that data.sources names, or look at the model with --text FILE"
        )
    return corpus


def read_text(path: Path) -> str:
    """A file's text. Raises ``DataError`` when it is missing, empty or not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    if not text.strip():
        raise DataError(f"{path} holds no text to look at the model with")
    return text


def text_batch(loaded: Loaded, text: str, rows: int, length: int) -> Batch:
    """``text`` cut into at most ``rows`` rows of ``length`` positions, each beginning with the end-of-text token.

    Raises:
        DataError: there is no tokenizer, or the text is shorter than two tokens.
    """
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise DataError(f"{loaded.path} has no tokenizer.json, so no text can be read; add the model's own")
    ids = tokenizer.encode(text[: 16 * rows * length])[: rows * length]
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} tokens; at least 2 are needed")
    count, length = max(1, len(ids) // length), min(length, len(ids))
    pieces = torch.tensor(ids[: count * length]).view(count, length)
    start = torch.full((count, 1), tokenizer.eos_id)
    n_bytes = len(tokenizer.decode(ids[: count * length]).encode())
    batch = Batch.from_rows(torch.cat((start, pieces), 1))
    return Batch(batch.tokens, batch.targets, n_targets=batch.n_targets, n_bytes=n_bytes)


def _standard_library() -> str:
    """Some of Python's own modules, as one text; the same ones on every machine that has them."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = [folder / name for name in ("argparse.py", "ast.py", "inspect.py", "typing.py", "random.py")]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in found if path.is_file()]
    if not texts:
        raise RunError("this Python has no sources of its standard library; give a text with --text FILE")
    return "\n".join(texts)


def long_row(loaded: Loaded, text: Path | str | None = None, longest: int = LONG) -> torch.Tensor:
    """One document, as long as the model takes and at most ``longest`` positions: int64 ``[1, T]``.

    From the run's held-out documents the longest is taken; else ``text``, or the standard library's sources.
    """
    limit = min(longest, loaded.model.config.max_length)
    if text is None and (loaded.path / "config.toml").is_file():
        found = _longest_document(loaded, limit)
        if found is not None:
            return found
    words = read_text(Path(text)) if text is not None else _standard_library()
    return text_batch(loaded, words, 1, limit).tokens


def _longest_document(loaded: Loaded, limit: int) -> torch.Tensor | None:
    corpus = _corpus(loaded)
    if corpus.held_out is None or not len(corpus.held_out):
        return None
    longest = int(corpus.held_out.records["length"].argmax())
    return torch.tensor([corpus.held_out.tokens(longest, 0, limit).tolist()])
