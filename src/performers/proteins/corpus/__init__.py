"""Corpora: many proteins, split honestly, on disk as memory-mapped tokens."""

from performers.proteins.corpus.prepare import prepare_corpus
from performers.proteins.corpus.rows import ShardedRows
from performers.proteins.corpus.shards import Corpus, TokenShards, is_corpus
from performers.proteins.options import CorpusOptions

__all__ = [
    "Corpus",
    "CorpusOptions",
    "ShardedRows",
    "TokenShards",
    "is_corpus",
    "prepare_corpus",
]
