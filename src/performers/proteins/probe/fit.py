"""Linear probes of one split: logistic regression for each label, and its scores."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

from performers.proteins.probe.options import STRENGTHS
from performers.proteins.probe.splits import ProbeSplit

_MAX_ITERATIONS = 300


@dataclass(frozen=True)
class ProbeFit:
    """Scores of the probes on one kind of features and one split.

    Attributes:
        strength: The C chosen.
        metrics: Name to value on the test part: `macro_auroc`, `macro_average_precision`,
            `micro_auroc`, `micro_average_precision`, and for labels of which each protein has
            one `accuracy` and `macro_f1`.
        auroc: On the test part, by label.
        average_precision: On the test part, by label.
        unconverged: Number of regressions stopped before they converged, of all strengths.
    """

    strength: float
    metrics: dict[str, float]
    auroc: NDArray[np.float64]
    average_precision: NDArray[np.float64]
    unconverged: int


def fit_probe(
    features: Any,
    targets: NDArray[np.bool_],
    split: ProbeSplit,
    *,
    multiclass: bool,
    strengths: Sequence[float] = STRENGTHS,
    progress: Callable[[], None] | None = None,
) -> ProbeFit:
    """Fit one regression per label and strength, and score the best strength on the test part.

    Dense features are standardised with the mean and spread of the training part. Sparse ones are
    taken as they are: to scale each column by its spread would make the rarest words the loudest.
    One strength serves all labels: that with the least cross-entropy on the validation part. What
    is tested was fitted to the training part only.

    Features are (proteins, width), a NumPy array, or a SciPy sparse one with rows of about unit
    norm; targets are (proteins, labels), with examples and counter-examples in each part. With
    `multiclass` each protein has exactly one label; the label predicted is then that with the
    highest log-odds. `progress` is called after each label of each strength.
    """
    train, validation, test = _standardised(features, split)
    regressions = [
        # Each strength starts from the weights of the one before.
        LogisticRegression(max_iter=_MAX_ITERATIONS, warm_start=True)
        for _ in range(targets.shape[1])
    ]
    scores: NDArray[np.float64] = np.empty(0)
    least, chosen = np.inf, 0.0
    unconverged = 0
    for strength in sorted(strengths):
        chosen_on = np.empty((len(split["validation"]), targets.shape[1]))
        tested_on = np.empty((len(split["test"]), targets.shape[1]))
        for column, regression in enumerate(regressions):
            regression.C = strength
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                regression.fit(train, targets[split["train"], column])
            unconverged += int(regression.n_iter_[0] >= _MAX_ITERATIONS)
            chosen_on[:, column] = regression.decision_function(validation)
            tested_on[:, column] = regression.decision_function(test)
            if progress is not None:
                progress()
        signs = np.where(targets[split["validation"]], -1.0, 1.0)
        loss = float(np.logaddexp(0.0, signs * chosen_on).mean())
        if loss < least:
            least, chosen, scores = loss, strength, tested_on
    tested = targets[split["test"]]
    auroc = np.atleast_1d(roc_auc_score(tested, scores, average=None))
    precision = np.atleast_1d(average_precision_score(tested, scores, average=None))
    metrics = {
        "macro_auroc": float(auroc.mean()),
        "macro_average_precision": float(precision.mean()),
        "micro_auroc": float(roc_auc_score(tested.ravel(), scores.ravel())),
        "micro_average_precision": float(average_precision_score(tested.ravel(), scores.ravel())),
    }
    if multiclass:
        actual, predicted = tested.argmax(1), scores.argmax(1)
        metrics["accuracy"] = float((actual == predicted).mean())
        metrics["macro_f1"] = float(f1_score(actual, predicted, average="macro"))
    return ProbeFit(chosen, metrics, auroc, precision, unconverged)


def _standardised(features: Any, split: ProbeSplit) -> list[Any]:
    """The three parts, dense ones scaled by what the training part shows."""
    if sparse.issparse(features):
        return [features[rows] for rows in split.values()]
    scaler = StandardScaler()
    features = np.asarray(features, dtype=np.float32)
    scaler.fit(features[split["train"]])
    return [scaler.transform(features[rows]) for rows in split.values()]
