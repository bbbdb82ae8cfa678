"""Block sizes of the kernels."""

from typing import NamedTuple

import torch


class Blocks(NamedTuple):
    """The shape of a kernel's blocks: features and rows at a time, warps, stages of loads."""

    features: int
    rows: int
    warps: int
    stages: int


# By dtype and head_dim, up to 64 and 128: the blocks of a kernel on sm_80, and on sm_90 and later
# where they are others. They are about the largest that compile without spills;
# tests/attention/triton/test_compiles.py keeps them so. Dtypes other than bfloat16, whose operands
# are float32, have only those that differ.
_TABLE: dict[tuple[torch.dtype, int], dict[str, tuple[Blocks, ...]]] = {
    (torch.bfloat16, 64): {
        "key_norms": (Blocks(0, 64, 4, 1),),
        "key_sums": (Blocks(64, 64, 4, 3),),
        "key_states": (Blocks(32, 64, 4, 2), Blocks(64, 64, 4, 2)),
        "combine": (Blocks(16, 0, 4, 1),),
        "read_rows": (Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 2)),
        "row_terms": (Blocks(0, 64, 4, 1),),
        "query_sums": (Blocks(64, 64, 8, 2), Blocks(64, 64, 4, 2)),
        "query_states": (Blocks(32, 64, 4, 2), Blocks(64, 64, 8, 2)),
        "query_gradients": (Blocks(32, 64, 4, 2),),
        "key_gradients": (Blocks(32, 64, 4, 2),),
        "chunk_rows": (Blocks(16, 64, 8, 2), Blocks(16, 64, 4, 2)),
        "chunk_query_gradients": (Blocks(32, 64, 4, 2),),
        # Rows are keys, of a chunk.
        "chunk_key_gradients": (Blocks(32, 32, 8, 2), Blocks(32, 32, 4, 2)),
        # Rows at a time, of a chunk.
        "mend": (Blocks(0, 16, 4, 1),),
        "mend_key_gradients": (Blocks(0, 16, 8, 1),),
        # Features are keys.
        "exact_pairs": (Blocks(32, 64, 4, 3), Blocks(64, 64, 4, 2)),
        # Rows are columns of values.
        "decode_step": (Blocks(32, 64, 4, 1),),
    },
    (torch.bfloat16, 128): {
        "key_norms": (Blocks(0, 32, 4, 1),),
        "key_sums": (Blocks(64, 64, 8, 2),),
        "key_states": (Blocks(64, 64, 8, 2),),
        "combine": (Blocks(16, 0, 4, 1),),
        "read_rows": (Blocks(64, 64, 8, 2),),
        "row_terms": (Blocks(0, 32, 4, 1),),
        "query_sums": (Blocks(64, 64, 8, 2),),
        "query_states": (Blocks(64, 64, 8, 2),),
        "query_gradients": (Blocks(32, 64, 8, 2),),
        "key_gradients": (Blocks(32, 64, 8, 2),),
        "chunk_rows": (Blocks(32, 64, 8, 2),),
        "chunk_query_gradients": (Blocks(32, 64, 8, 2),),
        "chunk_key_gradients": (Blocks(16, 32, 8, 1),),
        "mend": (Blocks(0, 16, 4, 1),),
        "mend_key_gradients": (Blocks(0, 16, 8, 1),),
        "exact_pairs": (Blocks(32, 64, 8, 2), Blocks(64, 64, 8, 2)),
        "decode_step": (Blocks(32, 64, 4, 1),),
    },
    (torch.float16, 64): {
        "chunk_rows": (Blocks(16, 64, 8, 2), Blocks(32, 64, 8, 2)),
        "chunk_query_gradients": (Blocks(16, 64, 4, 2),),
        "chunk_key_gradients": (Blocks(32, 32, 8, 2), Blocks(16, 32, 4, 2)),
        "exact_pairs": (Blocks(32, 64, 4, 3), Blocks(64, 64, 8, 2)),
    },
    (torch.float16, 128): {
        "chunk_rows": (Blocks(32, 32, 8, 2), Blocks(32, 64, 8, 2)),
        "chunk_query_gradients": (Blocks(32, 32, 8, 2), Blocks(16, 64, 8, 2)),
        "exact_pairs": (Blocks(32, 64, 8, 2),),
    },
    (torch.float32, 64): {
        "key_sums": (Blocks(32, 64, 4, 2),),
        "key_states": (Blocks(32, 64, 8, 2),),
        "read_rows": (Blocks(32, 32, 4, 2),),
        "query_sums": (Blocks(32, 32, 4, 2),),
        "query_states": (Blocks(32, 64, 8, 2),),
        "query_gradients": (Blocks(32, 32, 4, 2),),
        "key_gradients": (Blocks(32, 32, 4, 2),),
        "chunk_rows": (Blocks(16, 32, 4, 2),),
        "chunk_query_gradients": (Blocks(16, 32, 4, 2),),
        "chunk_key_gradients": (Blocks(16, 16, 8, 2), Blocks(16, 16, 4, 2)),
        "exact_pairs": (Blocks(32, 32, 8, 2),),
    },
}


def blocks_of(kernel: str, width: int, capability: int, dtype: torch.dtype) -> Blocks:
    """The blocks of a kernel for a padded head_dim, the larger of those of keys and values."""
    width = 64 if width <= 64 else 128
    blocks = _TABLE.get((dtype, width), {}).get(kernel) or _TABLE[torch.bfloat16, width][kernel]
    return blocks[-1] if capability >= 90 else blocks[0]
