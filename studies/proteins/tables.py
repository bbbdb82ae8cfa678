"""The study's tables, as rows of text for Markdown and HTML alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from studies.proteins.summary import Claim, Row

LABELS = {
    "exact": "Transformer",
    "favor-relu": "Performer-ReLU",
    "favor-softmax": "Performer-softmax",
    "lsh": "Reformer (LSH)",
    "linformer": "Linformer",
    "local": "local window",
    "bigbird": "BigBird-style",
    "identity": "no attention",
}
OBJECTIVES = {"mlm": "masked", "clm": "causal"}


class Table(NamedTuple):
    """A table of text.

    Attributes:
        caption: A line above it.
        header: Heads of the columns.
        rows: The cells.
        names: How many columns from the left hold names.
    """

    caption: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    names: int = 1

    def markdown(self) -> str:
        """As GitHub's Markdown."""
        rule = ["---"] * self.names + ["---:"] * (len(self.header) - self.names)
        lines = [self.header, rule, *self.rows]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"{self.caption}\n\n{body}\n"


def label(attention: str) -> str:
    """What tables and figures call an attention."""
    return LABELS.get(attention, f"Performer-{attention.removeprefix('favor-')}")


def accuracy_table(rows: Sequence[Row], caption: str) -> Table:
    """Accuracy and perplexity of every split, mean ± sd over seeds, with the unigram baseline."""
    if not rows:
        return Table(caption, (), [])
    splits = list(dict.fromkeys(split for split, _ in rows[0].scores))
    header = ["objective", "attention"]
    for split in splits:
        header += [f"{split} accuracy %", f"{split} perplexity"]
    header += ["training, s", "parameters", "seeds"]
    lines: list[tuple[str, ...]] = []
    last = None
    for row in rows:
        if row.objective != last:
            last = row.objective
            cells = [OBJECTIVES[last], "unigram baseline"]
            for split in splits:
                cells += [
                    f"{100 * row.baseline[split, 'accuracy']:.2f}",
                    f"{row.baseline[split, 'perplexity']:.2f}",
                ]
            lines.append((*cells, "", "", ""))
        cells = [OBJECTIVES[row.objective], label(row.attention)]
        for split in splits:
            cells += [
                row.scores[split, "accuracy"].text(factor=100),
                row.scores[split, "perplexity"].text(),
            ]
        cells += [row.seconds.text(0), f"{row.parameters:,}", f"{len(row.seeds)}"]
        lines.append(tuple(cells))
    return Table(caption, tuple(header), lines, names=2)


def claims_table(claims: Sequence[Claim]) -> Table:
    """The paper's claims as measured."""
    rows = [
        (
            claim.text,
            f"{claim.difference:+.2f}" + ("" if claim.sd is None else f" ± {claim.sd:.2f}"),
            f"{'>' if claim.strict else '≥'} {claim.least:g}",
            f"{claim.seeds}",
            claim.verdict,
        )
        for claim in claims
    ]
    caption = (
        "The paper's orderings: difference of accuracies in percentage points, by seed. Undecided: "
        "within one standard deviation of what is asked."
    )
    return Table(caption, ("claim", "measured", "asked", "seeds", "verdict"), rows)


def concatenated_table(plan: Mapping[str, Any], done: Mapping[str, Any]) -> Table:
    """Models on rows of concatenated proteins: cost of a step, and scores at equal time."""
    rows = []
    for name, entry in plan.items():
        cost, options = entry["cost"], entry["options"]
        result = done.get(name)
        cells = [name, cost["failure"] or f"{cost['seconds']:.2f}", _gib(cost["peak_bytes"])]
        cells += (
            ["", ""] if options is None else [str(options["num_layers"]), f"{options['steps']:,}"]
        )
        if result is None:
            cells += [""] * 5
        else:
            cells.append(f"{result['seconds']:.0f}")
            for split in ("test", "ood"):
                scores = result["scores"][split]
                cells += [f"{100 * scores['accuracy']:.2f}", f"{scores['perplexity']:.2f}"]
        rows.append(tuple(cells))
    header = (
        *("model", "step, s", "memory of a step, GiB", "layers", "steps", "training, s"),
        *("test accuracy %", "test perplexity", "ood accuracy %", "ood perplexity"),
    )
    return Table("Concatenated proteins, at equal time of training.", header, rows)


def contexts_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Seconds and memory of a forward pass, attention by length."""
    lengths = sorted({row["length"] for row in rows})
    attentions = list(dict.fromkeys(row["attention"] for row in rows))
    cells = {(row["attention"], row["length"]): row for row in rows}
    lines = []
    for length in lengths:
        line = [f"{length:,}"]
        for attention in attentions:
            row = cells.get((attention, length))
            if row is None:
                line.append("not run")
            elif row["failure"]:
                line.append(row["failure"])
            else:
                line.append(f"{row['seconds']:.2f} s, {_gib(row['peak_bytes'])} GiB")
        lines.append(tuple(line))
    header = ("tokens", *(label(attention) for attention in attentions))
    return Table("A forward pass of one row: time and memory.", header, lines)


def similarity_table(models: Mapping[str, Any]) -> Table:
    """Amino-acid similarity, of attention and of embeddings, against substitution matrices."""
    rows = []
    for name, numbers in models.items():
        similarity = numbers["similarity"]
        parts = {}
        if similarity is None:
            rows.append((label(name), numbers["problem"] or "none", *[""] * 5))
        else:
            above = f"attention above {similarity['threshold']:g}"
            parts = {"attention": similarity["all"], above: similarity["thresholded"]}
        # A study of an earlier version has none.
        if numbers.get("embeddings"):
            parts["embeddings"] = {**numbers["embeddings"], "heads": ""}
        for kind, part in parts.items():
            for matrix, found in part["matrices"].items():
                rows.append(
                    (
                        label(name),
                        kind,
                        matrix,
                        _decimals(found["pearson"]),
                        _decimals(found["spearman"]),
                        _decimals(found["p_value"], 4),
                        f"{part['heads']}",
                    )
                )
    header = ("model", "read from", "matrix", "Pearson", "Spearman", "p", "heads")
    caption = (
        "Similarity of amino acids read from attention, or from input embeddings, against "
        "substitution matrices, off the diagonal; p of Pearson's, one-sided (at least as "
        "similar), by permutation of the amino acids."
    )
    return Table(caption, header, rows, names=3)


def pairs_table(models: Mapping[str, Any]) -> Table:
    """The most similar pairs, and the rank of those that biochemistry would expect."""
    rows = []
    for name, numbers in models.items():
        similarity = numbers["similarity"]
        if similarity is None:
            continue
        part = similarity["all"]
        top = ", ".join(pair["pair"] for pair in part["top_pairs"])
        expected = ", ".join(
            f"{pair['pair']} {pair['rank']} of {pair['of']}" for pair in part["expected_pairs"]
        )
        rows.append((label(name), top, expected))
    return Table(
        "Pairs of amino acids that attention treats most alike.",
        ("model", "most similar pairs", "rank of the expected pairs"),
        rows,
        names=3,
    )


def _decimals(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _gib(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 2**30:.2f}"
