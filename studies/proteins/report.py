"""The study's tables and figures, and a page of them, as far as there are results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from performers.app.figures import save_figure
from performers.app.files import read_json, write_atomically, write_json
from performers.benchmark.plot import MUTED, PALETTE, draw_lines, new_figure, size_axis, style
from studies.pages import Table
from studies.proteins.summary import Claim, Row, claims, summarise

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
_COLOURS = {"test": PALETTE[0], "ood": PALETTE[1]}
_CAPTIONS = {
    "accuracy": "Same data order, steps and settings; mean ± sd over seeds.",
    "claims": "The paper's orderings: difference of accuracies in percentage points, mean ± sd "
    "over seeds, with the 95% interval of a paired bootstrap over test sequences and seeds. "
    "Undecided: the interval holds what is asked. No verdict comes from one seed, or from a model "
    "that is not above the frequency baseline.",
    "kernels": "Generalized attention: the kernel function of the features.",
    "concatenated": "Concatenated proteins, at equal time of training.",
    "contexts": "A forward pass of one row: time and memory.",
    "similarity": "Similarity of amino acids read from attention, or from input embeddings, "
    "against substitution matrices, off the diagonal; p of Pearson's, one-sided (at least as "
    "similar), by permutation of the amino acids.",
    "pairs": "Pairs of amino acids that attention treats most alike.",
}


def label(attention: str) -> str:
    """Name of an attention in tables and figures."""
    return LABELS.get(attention, f"Performer-{attention.removeprefix('favor-')}")


def write_report(output: Path) -> Path:
    """Write ``results.json``, ``figures/`` and ``report.md`` from the files of a study."""
    content = gather(output)
    settings, ended = content["settings"], content["runs"]
    done = [run for run in ended if "failure" not in run]
    compared = [run for run in done if run["experiment"] == "comparison"]
    rows = summarise(compared, list(dict.fromkeys([*settings["masked"], *settings["causal"]])))
    kernels = _kernel_rows(settings, done)
    tables = {
        "accuracy": accuracy_table(rows),
        "claims": claims_table(claims(rows)),
        "kernels": accuracy_table(kernels),
        "concatenated": concatenated_table(content["plan"], content["concatenated"]),
        "contexts": contexts_table(content["contexts"]),
        "similarity": similarity_table(content["learnt"].get("models", {})),
        "pairs": pairs_table(content["learnt"].get("models", {})),
    }
    tables = {name: table for name, table in tables.items() if table.rows}
    shown = {name: table._asdict() for name, table in tables.items()}
    write_json(output / "results.json", {**content, "runs": _brief(ended), "tables": shown})
    figures: dict[str, Callable[[], Figure]] = {
        "accuracy": lambda: accuracy_figure(rows, "Accuracy by attention"),
        "kernels": lambda: accuracy_figure(kernels, "Accuracy by kernel"),
        "contexts": lambda: contexts_figure(content["contexts"]),
    }
    planned = [*settings["masked"], *settings["causal"]]
    repeated = sum(attention not in settings["once"] for attention in planned)
    wanted = len(planned) + (len(settings["seeds"]) - 1) * repeated
    title = f"Attention on proteins: {settings['data_name']}, preset {settings['preset']}"
    parts = [
        f"# {title}",
        f"{len(compared)} of {wanted} runs of the comparison are done. Accuracy and perplexity "
        "per residue, all of them hidden behind the mask token under the masked objective.",
        *(
            f"{label(run['attention'])}, {OBJECTIVES[run['objective']]}, seed {run['seed']}: no "
            f"result; {run['failure'].partition(';')[0]}."
            for run in ended
            if "failure" in run
        ),
    ]
    for name, table in tables.items():
        parts += [_CAPTIONS[name], table.markdown()]
        if name in figures:
            save_figure(figures[name](), output / "figures" / f"{name}.png")
            parts.append(f"![{_CAPTIONS[name]}](figures/{name}.png)")
    pictures = content["learnt"].get("figures", {})
    parts += [f"![{name}](learnt/{path})" for name, path in pictures.items()]
    values = {**settings, **settings["training"]}
    lines = [(key, f"{value}") for key, value in values.items() if not isinstance(value, dict)]
    parts += ["## Settings", Table(("setting", "value"), lines, names=2).markdown()]
    write_atomically(output / "report.md", ("\n\n".join(parts) + "\n").encode())
    return output / "report.md"


def gather(output: Path) -> dict[str, Any]:
    """The results of a study so far, from its files."""

    def read(path: Path) -> Any:
        return read_json(path) if path.exists() else {}

    long = output / "concatenated"
    return {
        "settings": read_json(output / "study.json"),
        "runs": [read_json(path) for path in sorted(output.glob("runs/*/result.json"))],
        "plan": read(long / "plan.json"),
        "concatenated": {x.parent.name: read_json(x) for x in sorted(long.glob("*/result.json"))},
        "contexts": read(output / "contexts.json").get("rows", []),
        "learnt": read(output / "learnt" / "learnt.json"),
    }


def _brief(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Runs without what they scored on each sequence, which stays in their folders."""
    return [
        {
            **run,
            "scores": {
                split: {k: v for k, v in scores.items() if not k.endswith("_by_sequence")}
                for split, scores in run.get("scores", {}).items()
            },
        }
        for run in runs
    ]


def _kernel_rows(settings: Mapping[str, Any], done: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows of the kernels, with those of the comparison that belong beside them."""
    ablated = [run for run in done if run["experiment"] == "kernels"]
    beside = [
        run
        for run in done
        if run["experiment"] == "comparison"
        and run["objective"] == "mlm"
        and run["attention"] in ("favor-relu", "favor-softmax")
        and run["seed"] in settings["kernel_seeds"]
    ]
    order = ["favor-relu", "favor-softmax", *settings["kernels"]]
    return summarise([*beside, *ablated], order) if ablated else []


def accuracy_table(rows: Sequence[Row]) -> Table:
    """Accuracy and perplexity of every split, mean ± sd over seeds, with the unigram baseline."""
    if not rows:
        return Table((), [])
    splits = list(dict.fromkeys(split for split, _ in rows[0].scores))
    header = ["objective", "attention"]
    header += [x for split in splits for x in (f"{split} accuracy %", f"{split} perplexity")]
    lines: list[tuple[str, ...]] = []
    for number, row in enumerate(rows):
        objective = OBJECTIVES[row.objective]
        if number == 0 or rows[number - 1].objective != row.objective:
            cells = [objective, "unigram baseline"]
            for split in splits:
                cells.append(f"{100 * row.baseline[split, 'accuracy']:.2f}")
                cells.append(f"{row.baseline[split, 'perplexity']:.2f}")
            lines.append((*cells, "", "", ""))
        cells = [objective, label(row.attention)]
        for split in splits:
            cells.append(row.scores[split, "accuracy"].text(factor=100))
            cells.append(row.scores[split, "perplexity"].text())
        cells += [row.seconds.text(0), f"{row.parameters:,}", f"{len(row.seconds.values)}"]
        lines.append(tuple(cells))
    return Table([*header, "training, s", "parameters", "seeds"], lines, names=2)


def claims_table(found: Sequence[Claim]) -> Table:
    """The paper's claims as measured."""
    rows = []
    for claim in found:
        difference = claim.difference
        spread = "" if difference.sd is None else f" ± {difference.sd:.2f}"
        asked = f"{'>' if claim.strict else '≥'} {claim.least:g}"
        seeds = f"{len(difference.values)}"
        measured, interval = f"{difference.mean:+.2f}{spread}", ""
        if claim.interval is not None:
            interval = "{:+.2f} to {:+.2f}".format(*claim.interval)
        rows.append((claim.text, measured, interval, asked, seeds, claim.verdict))
    return Table(("claim", "measured", "95% interval", "asked", "seeds", "verdict"), rows)


def concatenated_table(plan: Mapping[str, Any], done: Mapping[str, Any]) -> Table:
    """Models on rows of concatenated proteins: cost of a step, and scores at equal time."""
    rows = []
    for name, entry in plan.items():
        cost, options, result = entry["cost"], entry["options"], done.get(name)
        cells = [name, cost["failure"] or f"{cost['seconds']:.2f}", _gib(cost["peak_bytes"])]
        cells += [str(options["num_layers"]), f"{options['steps']:,}"] if options else ["", ""]
        cells += [f"{result['seconds']:.0f}"] if result else [""] * 5
        for split in ("test", "ood"):
            if result:
                scores = result["scores"][split]
                cells += [f"{100 * scores['accuracy']:.2f}", f"{scores['perplexity']:.2f}"]
        rows.append(tuple(cells))
    header = (
        *("model", "step, s", "memory of a step, GiB", "layers", "steps", "training, s"),
        *("test accuracy %", "test perplexity", "ood accuracy %", "ood perplexity"),
    )
    return Table(header, rows)


def contexts_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Seconds and memory of a forward pass, attention by length."""
    attentions = list(dict.fromkeys(row["attention"] for row in rows))
    cells = {
        (row["attention"], row["length"]): row["failure"]
        or f"{row['seconds']:.2f} s, {_gib(row['peak_bytes'])} GiB"
        for row in rows
    }
    lines = [
        (f"{length:,}", *(cells.get((attention, length), "not run") for attention in attentions))
        for length in sorted({row["length"] for row in rows})
    ]
    return Table(("tokens", *map(label, attentions)), lines)


def similarity_table(models: Mapping[str, Any]) -> Table:
    """Amino-acid similarity, of attention and of embeddings, against substitution matrices."""
    rows: list[tuple[str, ...]] = []
    for name, numbers in models.items():
        similarity, parts = numbers["similarity"], {}
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
                values = [found["pearson"], found["spearman"], found["p_value"]]
                shown = ["" if x is None else f"{x:.{3 + n // 2}f}" for n, x in enumerate(values)]
                rows.append((label(name), kind, matrix, *shown, f"{part['heads']}"))
    header = ("model", "read from", "matrix", "Pearson", "Spearman", "p", "heads")
    return Table(header, rows, names=3)


def pairs_table(models: Mapping[str, Any]) -> Table:
    """The most similar pairs, and the rank of those that biochemistry would expect."""
    rows = []
    for name, numbers in models.items():
        if numbers["similarity"] is None:
            continue
        part = numbers["similarity"]["all"]
        expected = (f"{x['pair']} {x['rank']} of {x['of']}" for x in part["expected_pairs"])
        top = ", ".join(pair["pair"] for pair in part["top_pairs"])
        rows.append((label(name), top, ", ".join(expected)))
    return Table(("model", "most similar pairs", "rank of the expected pairs"), rows, names=3)


def _gib(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 2**30:.2f}"


def accuracy_figure(rows: Sequence[Row], title: str) -> Figure:
    """A point per seed, a bar at the mean, the unigram baseline as a line; a panel an objective."""
    objectives = list(dict.fromkeys(row.objective for row in rows))
    tallest = max(sum(row.objective == objective for row in rows) for objective in objectives)
    figure = new_figure((5.4 * len(objectives), 1.2 + 0.42 * tallest))
    axes = figure.subplots(1, len(objectives), squeeze=False)[0]
    for ax, objective in zip(axes, objectives, strict=True):
        shown = [row for row in rows if row.objective == objective]
        for number, (split, colour) in enumerate(_COLOURS.items()):
            baseline = 100 * shown[0].baseline[split, "accuracy"]
            ax.axvline(baseline, color=colour, linestyle=":", linewidth=1)
            for place, row in enumerate(shown):
                spread = row.scores[split, "accuracy"]
                height = place + 0.16 * (2 * number - 1)
                values = [100 * value for value in spread.values.values()]
                ax.plot(values, [height] * len(values), "o", color=colour, markersize=4, alpha=0.6)
                ax.plot([100 * spread.mean], [height], "|", color=colour, markersize=14, mew=2)
        ax.set_yticks(range(len(shown)), [label(row.attention) for row in shown])
        ax.invert_yaxis()
        ax.set_xlabel("accuracy, %")
        style(ax, OBJECTIVES[objective])
    for split, colour in _COLOURS.items():
        axes[-1].plot([], [], "o", color=colour, label=split)
    axes[-1].plot([], [], ":", color=MUTED, label="unigram baseline")
    axes[-1].legend(frameon=False, fontsize=8, loc="best")
    figure.suptitle(title, fontsize=11)
    return figure


def contexts_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Seconds and memory of a forward pass against length, on logarithmic axes."""
    figure = new_figure((9.6, 3.8))
    axes = figure.subplots(1, 2)
    named = [{**row, "label": label(row["attention"])} for row in rows]
    names = list(dict.fromkeys(row["label"] for row in named))
    for ax, column, text in ((axes[0], "seconds", "seconds"), (axes[1], "peak_bytes", "memory")):
        draw_lines(ax, named, "length", column, "label", names)
        ax.set_xscale("log", base=2)
        ax.set_xlabel("tokens in one context")
        size_axis(ax, column, text)
        style(ax)
    axes[0].legend(frameon=False, fontsize=8)
    return figure
