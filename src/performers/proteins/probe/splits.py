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


def split_proteins(
    groups: NDArray[np.int64],
    *,
    test: float = 0.2,
    validation: float = 0.1,
    seed: int = 0,
) -> ProbeSplit:
    """Split proteins at random, whole groups at a time.

    Groups are taken in random order. One that still fits into the test part, which holds at most
    the share `test` of the proteins, goes there; else into the validation part, if it fits there;
    else into the training part, where the largest groups thus end.

    Args:
        groups: Number of each protein's group; all different for a split of single proteins.
        test: Share of the proteins to test on.
        validation: Share of the proteins to choose on.
        seed: Seed of the order.

    Raises:
        UserError: A share is out of range, or the groups are too few or too large to fill a part.
    """
    if not (0 < test < 1 and 0 < validation < 1 and test + validation < 1):
        raise UserError(
            f"test and validation must be shares above 0 that leave some to train on, got {test} "
            f"and {validation}"
        )
    numbers, membership, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    room = {"test": test * len(groups), "validation": validation * len(groups)}
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


def split_groups(task: ProbeTask, options: ProbeOptions) -> NDArray[np.int64]:
    """Number of the group of each protein; for a random split each protein is its own."""
    groups = task.groups if options.split == "groups" else np.arange(len(task.proteins))
    if groups is None:
        raise ValueError("task.groups must not be None for split='groups'")
    return groups


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
    groups = split_groups(task, options)
    splits = [
        split_proteins(groups, test=options.test, validation=options.validation, seed=seed)
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
