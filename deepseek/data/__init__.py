"""From files of text to batches of tokens: sources, cleaning, de-duplication, tokenizer, stores, packing,
loading.
"""

from deepseek.data.clean import CleanConfig, Cleaner
from deepseek.data.corpus import Corpus, DataConfig, prepare
from deepseek.data.dedup import DedupConfig, Deduplicator, Duplicate
from deepseek.data.loader import Loader, Sample, eval_batches
from deepseek.data.quality import DriftAlert, QualityConfig, QualityMonitor
from deepseek.data.records import open_source
from deepseek.data.source import BadRecord, BadRecords, Document, Source, SourceConfig, is_held_out
from deepseek.data.store import StoreWriter, TokenStore
from deepseek.data.tokenizer import IncrementalDecoder, Tokenizer, train_tokenizer

__all__ = [
    "BadRecord",
    "BadRecords",
    "CleanConfig",
    "Cleaner",
    "Corpus",
    "DataConfig",
    "DedupConfig",
    "Deduplicator",
    "Document",
    "DriftAlert",
    "Duplicate",
    "IncrementalDecoder",
    "Loader",
    "QualityConfig",
    "QualityMonitor",
    "Sample",
    "Source",
    "SourceConfig",
    "StoreWriter",
    "TokenStore",
    "Tokenizer",
    "eval_batches",
    "is_held_out",
    "open_source",
    "prepare",
    "train_tokenizer",
]
