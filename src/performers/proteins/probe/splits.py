"""Splits of proteins into parts that share no group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from performers.app.errors import UserError
from performers.proteins.probe.options import ProbeOptions
from performers.proteins.probe.task import ProbeTask

ProbeSplit: TypeAlias = dict[str, NDArray[np.int64]]
"""Rows of the proteins, rising, to ``train`` on, to choose the penalty on (``validation``) and to
``test`` on."""


def split_proteins(groups: NDArray[np.int64], options: ProbeOptions, seed: int) -> ProbeSplit:
    """Split proteins at random, whole groups at a time.

    Groups are taken in random order. One that still fits into the test part, which holds at most
    the share `options.test` of the proteins, goes there; else into the validation part, if it fits
    there; else into the training part, where the largest groups thus end.

    Args:
        groups: Number of each protein's group; all different for a split of single proteins.
        options: Shares of the proteins to test and to choose on.
        seed: Seed of the order.

    Raises:
        UserError: The groups are too few or too large to fill a part.
    """
    numbers, membership, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    room = {name: getattr(options, name) * len(groups) for name in ("test", "validation")}
    part = np.full(len(numbers), "train", dtype="<U10")
    for group in np.random.default_rng(seed).permutation(len(numbers)):
        fits = [name for name, places in room.items() if sizes[group] <= places]
        if fits:
            part[group] = fits[0]
            room[fits[0]] -= sizes[group]
    names = ("train", "validation", "test")
    split = {name: np.flatnonzero(part[membership] == name) for name in names}
    if not all(map(len, split.values())):
        raise UserError(
            f"{len(groups):,} proteins in {len(numbers):,} groups, the largest of "
            f"{sizes.max():,}, cannot be split into a training, a validation and a test part; give "
            "more proteins, or smaller groups"
        )
    return split


def plan_splits(
    task: ProbeTask, options: ProbeOptions
) -> tuple[list[ProbeSplit], list[int], dict[str, str]]:
    """Splits of a task's proteins, and the labels that are frequent enough in all of them.

    Returns:
        The splits, the columns of the labels that are kept, and labels that are not to the reason.
        Proteins whose only label was dropped are in no split.

    Raises:
        UserError: Labels are too rare, or the groups cannot be split.
    """
    splits = [
        split_proteins(task.groups, options, seed)
        for seed in range(options.seed, options.seed + options.repeats)
    ]
    kept, dropped = _frequent_enough(task, splits, options.min_count)
    if task.multiclass and dropped:
        # A protein whose only label was dropped has nothing that could be predicted.
        has_label = np.asarray(task.targets[:, kept].any(1))
        splits = [{name: rows[has_label[rows]] for name, rows in split.items()} for split in splits]
    return splits, kept, dropped


def _frequent_enough(
    task: ProbeTask, splits: Sequence[ProbeSplit], least: int
) -> tuple[list[int], dict[str, str]]:
    """Columns of the labels to keep, and why the others are dropped."""
    parts = [(name, rows) for split in splits for name, rows in split.items()]
    dropped: dict[str, str] = {}
    kept: list[int] = []
    for column, label in enumerate(task.labels):
        for kind, held in (
            ("with", task.targets[:, column]),
            ("without", ~task.targets[:, column]),
        ):
            fewest, name = min((int(held[rows].sum()), name) for name, rows in parts)
            if fewest < least:
                dropped[label] = f"{fewest} proteins {kind} it in a {name} part"
                break
        else:
            kept.append(column)
    if not kept or (task.multiclass and len(kept) < 2):
        seen = "; ".join(f"{label}: {reason}" for label, reason in list(dropped.items())[:3])
        raise UserError(
            f"{task.source}: {len(kept)} of {len(task.labels)} labels have {least} proteins with "
            f"and without them in each part of each split ({seen}); give more proteins, or lower "
            "--min-count"
        )
    return kept, dropped
