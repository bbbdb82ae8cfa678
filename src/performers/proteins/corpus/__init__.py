"""Corpora: many proteins, split honestly, on disk as memory-mapped tokens."""

from performers.proteins.corpus.blocks import Part
from performers.proteins.corpus.merge import merge_parts
from performers.proteins.corpus.prepare import prepare_clustered, prepare_corpus, prepare_part
from performers.proteins.corpus.shards import Corpus, TokenShards, is_corpus
from performers.proteins.options import CorpusOptions, SplitOptions

__all__ = [
    "Corpus",
    "CorpusOptions",
    "Part",
    "SplitOptions",
    "TokenShards",
    "is_corpus",
    "merge_parts",
    "prepare_clustered",
    "prepare_corpus",
    "prepare_part",
]
