"""Shares of attention that the residues of a protein pay to each of its relatives."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from performers.models.attention import PerformerSelfAttention
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.relatives import RelativesRows
from performers.proteins.reading.residues import FOLDS
from performers.proteins.scoring.batches import evaluation_mode


@dataclass(frozen=True, eq=False)
class RelativeShares:
    """Attention of a protein's residues to its relatives.

    Attributes:
        protein: The protein.
        names: Names of the relatives, the nearest in the row first.
        shares: Share of a residue's attention, (relatives, residues), the mean over all heads of
            all layers; the rest of it is on the protein itself.
    """

    protein: ProteinRecord
    names: Sequence[str]
    shares: npt.NDArray[np.float64]


def relative_shares(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protein: ProteinRecord,
    relatives: RelativesRows,
) -> RelativeShares:
    """Read which relatives the residues of a protein are predicted from, by attention.

    A residue of a masked model is hidden while its attention is read, a seventh of them at a time;
    that of a causal model is read at the token before it. The share of a relative is the sum of
    the residue's attention weights over the tokens of the relative. No matrix is formed: it is the
    output of the layer's attention, in linear time, for values that say which relative a token is
    of.

    `relatives` has one row, of the protein after its relatives.
    """
    example = relatives[0]
    start, length = int(relatives.starts[0]), len(protein.sequence)
    sizes = relatives.sizes[0]
    # The row has the nearest relative last, and then the protein.
    member = np.repeat(np.arange(len(sizes) + 1), [*sizes[::-1], length + 2])
    members = nn.functional.one_hot(torch.from_numpy(member)).to(model.device)
    read: list[Tensor] = []

    def read_shares(mechanism: nn.Module, args: tuple[Any, ...]) -> None:
        query, key, _, context, layer = args
        values = members.to(key.dtype).expand(*key.shape[:2], -1, -1)
        # Not the call, whose hook this is.
        shares, _ = mechanism.forward(query, key, values, context, layer)
        read.append(shares[0].mean(0).cpu().double())

    tokens = torch.from_numpy(example["input_ids"].astype(np.int64)).to(model.device)[None]
    inputs: dict[str, Any] = {
        "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.from_numpy(example["position_ids"]).to(model.device)[None],
    }
    places = start + 1 + np.arange(length)
    found = np.empty((length, len(sizes)))
    if model.config.is_decoder:
        folds = [np.arange(length)]
        inputs["use_cache"], before = False, 1
    else:
        mixed = np.random.default_rng(0).permutation(length)
        folds, before = [fold for fold in np.array_split(mixed, FOLDS) if fold.size], 0
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, PerformerSelfAttention):
                hook = module.mechanism.register_forward_pre_hook(read_shares)
                stack.callback(hook.remove)
        for fold in folds:
            row = tokens.clone()
            if not before:
                row[0, places[fold]] = tokenizer.mask_token_id
            read.clear()
            with evaluation_mode(model):
                model.base_model(row, **inputs)
            found[fold] = torch.stack(read).mean(0)[places[fold] - before, : len(sizes)].numpy()
    return RelativeShares(protein, relatives.names[0], found.T[::-1])
