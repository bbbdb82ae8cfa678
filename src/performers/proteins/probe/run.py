"""Linear probes: labels of proteins from embeddings, and from simpler features.

A probe is a logistic regression on fixed features. It is repeated over several splits in which no
group of related proteins is on both sides, and each kind of features sees the same splits, so that
differences between them are paired.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from performers.app.progress import Progress
from performers.proteins.probe.fit import ProbeFit, fit_probe
from performers.proteins.probe.options import ProbeOptions
from performers.proteins.probe.splits import ProbeSplit, plan_splits
from performers.proteins.probe.task import ProbeTask

# Terms, and the classes of enzymes as tools/go_labels.py names them.
_GENE_ONTOLOGY = re.compile(r"GO:|EC[1-6]-")


def run_probe(
    features: Mapping[str, Any],
    task: ProbeTask,
    options: ProbeOptions,
    *,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Probe several kinds of features on the same splits.

    Args:
        features: Name to a matrix (proteins, width); the others are compared with the first.
        task: The proteins, their labels and groups.
        options: Options of the fits.
        notes: Remarks on the features, such as `feature_notes`.
        progress: Called with the regressions done and all of them.

    Returns:
        Content of `probe.json`:

        - `settings`, `proteins`, `groups`, `multiclass`;
        - `notes`: those of the task, those given, and what limits the numbers: splits that
          overlap, labels inferred from similarity, a C at the edge of what it was chosen from;
        - `labels`: label to `name`, `proteins` that have it and their `share`, which is the
          average precision of guessing;
        - `dropped`: label to why it was dropped;
        - `splits`: seed, and for each part the number of proteins, of groups, and of proteins of
          the largest group;
        - `features`: name to `width`, `strengths` chosen, `unconverged` regressions, `metrics` and
          `labels`, each value with `mean`, `sd` over the splits (sample; None of one split) and
          `values`;
        - `differences`: name of other features to the first features' metrics minus theirs, with
          `wins`, the splits in which the first were better;
        - `majority_accuracy` where each protein has one label: of always naming the label most
          frequent in the training part.

    Raises:
        UserError: No label is frequent enough, or the groups cannot be split.
    """
    splits, kept, dropped = plan_splits(task, options)
    targets: NDArray[np.bool_] = np.asarray(task.targets[:, kept])
    labels = [task.labels[column] for column in kept]
    used = np.unique(np.concatenate(list(splits[0].values())))
    done, total = 0, len(features) * len(splits) * len(options.strengths) * len(labels)

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    fits = {
        name: [
            fit_probe(
                matrix,
                targets,
                split,
                multiclass=task.multiclass,
                strengths=options.strengths,
                progress=step,
            )
            for split in splits
        ]
        for name, matrix in features.items()
    }
    first = next(iter(features))
    content: dict[str, Any] = {
        "settings": asdict(options),
        "proteins": len(used),
        "groups": len(np.unique(task.groups[used])),
        "multiclass": task.multiclass,
        "notes": [
            *task.notes,
            *notes,
            *_limits(labels, len(splits)),
            *_at_edges(fits, options.strengths),
        ],
        "labels": {
            label: {
                "name": task.label_names.get(label, label),
                "proteins": int(targets[used, column].sum()),
                "share": float(targets[used, column].mean()),
            }
            for column, label in enumerate(labels)
        },
        "dropped": dropped,
        "splits": [
            {"seed": options.seed + number, **_sizes(split, task.groups)}
            for number, split in enumerate(splits)
        ],
        "features": {
            name: _summary(found, labels, int(features[name].shape[1]))
            for name, found in fits.items()
        },
        "differences": {
            name: _differences(fits[first], found) for name, found in fits.items() if name != first
        },
    }
    if task.multiclass:
        most = [targets[split["train"]].sum(0).argmax() for split in splits]
        content["majority_accuracy"] = _spread(
            [float(targets[s["test"], label].mean()) for s, label in zip(splits, most, strict=True)]
        )
    return content


def _limits(labels: Sequence[str], repeats: int) -> list[str]:
    """Limits of the numbers, whatever they are."""
    notes = []
    if repeats > 1:
        notes.append(
            f"± is the standard deviation over {repeats} splits of the same proteins. They "
            "overlap, so it is a spread, not a standard error, and the splits won are no "
            "independent trials"
        )
    if any(_GENE_ONTOLOGY.match(label) for label in labels):
        notes.append(
            "labels of the Gene Ontology are partly inferred from sequence similarity, which "
            "favours features that tell relatives; what lacks a label may only not have been "
            "looked at"
        )
    return notes


def _at_edges(fits: Mapping[str, Sequence[ProbeFit]], strengths: Sequence[float]) -> list[str]:
    """Features that a wider choice of C might serve better."""
    if len(set(strengths)) < 2:
        return []
    notes = []
    for name, found in fits.items():
        for word, edge in (("least", min(strengths)), ("greatest", max(strengths))):
            count = sum(fit.strength == edge for fit in found)
            if count:
                notes.append(
                    f"{name}: the C chosen is the {word} tried, {edge:g}, in {count} of "
                    f"{len(found)} splits; one beyond might score better"
                )
    return notes


def _sizes(split: ProbeSplit, groups: NDArray[np.int64]) -> dict[str, dict[str, int]]:
    sizes = {}
    for name, rows in split.items():
        members = np.unique(groups[rows], return_counts=True)[1]
        sizes[name] = {
            "proteins": len(rows),
            "groups": len(members),
            "largest_group": int(members.max()),
        }
    return sizes


def _summary(fits: Sequence[ProbeFit], labels: Sequence[str], width: int) -> dict[str, Any]:
    return {
        "width": width,
        "strengths": [fit.strength for fit in fits],
        "unconverged": sum(fit.unconverged for fit in fits),
        "metrics": {name: _spread([f.metrics[name] for f in fits]) for name in fits[0].metrics},
        "labels": {
            label: {
                "auroc": _spread([float(fit.auroc[column]) for fit in fits]),
                "average_precision": _spread([float(f.average_precision[column]) for f in fits]),
            }
            for column, label in enumerate(labels)
        },
    }


def _differences(first: Sequence[ProbeFit], others: Sequence[ProbeFit]) -> dict[str, Any]:
    differences = {}
    for name in first[0].metrics:
        values = [a.metrics[name] - b.metrics[name] for a, b in zip(first, others, strict=True)]
        differences[name] = {**_spread(values), "wins": sum(value > 0 for value in values)}
    return differences


def _spread(values: Sequence[float]) -> dict[str, Any]:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": sd, "values": list(values)}
