"""The study's tables and figures, and a page of them, as far as there are results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from performers.app.figures import MUTED, PALETTE, new_figure, save_figure, styled
from performers.app.files import read_json, write_atomically, write_json
from performers.benchmark.plot import draw_lines, size_axis, style
from performers.benchmark.table import nbytes
from studies.pages import Table, pivot
from studies.proteins.summary import METRICS, Row, claims, spread_text, summarise

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
    kernel = attention.startswith("favor-")
    return LABELS.get(attention, f"Performer-{attention[6:]}" if kernel else attention)


def tables(content: Mapping[str, Any]) -> dict[str, Table]:
    """The tables of a study's ``results.json``, by name.

    Also those of the other files behind the page: a corpus's ``manifest.json``, and the
    ``report.json`` of ``performers report``.
    """
    models = content.get("learnt", {}).get("models", {})
    models = {**models, **{model["name"]: model["learnt"] for model in content.get("models", ())}}
    made = {
        "data": _splits_table(content.get("splits", {})),
        "accuracy": _accuracy_table(content.get("summary", ())),
        "claims": _claims_table(content.get("claims", ())),
        "kernels": _accuracy_table(content.get("kernels", ())),
        "concatenated": _concatenated_table(
            content.get("plan", {}), content.get("concatenated", {})
        ),
        "contexts": _contexts_table(content.get("contexts", ())),
        "similarity": _similarity_table(models),
        "pairs": _pairs_table(models),
    }
    return {name: table.filled() for name, table in made.items() if table.rows}


def write_report(output: Path) -> Path:
    """Write ``results.json``, ``figures/`` and ``report.md`` from the files of a study."""
    content = gather(output)
    write_json(output / "results.json", _brief(content))
    settings, rows, kernels = (content[name] for name in ("settings", "summary", "kernels"))
    figures: dict[str, Callable[[], Figure]] = {
        "accuracy": lambda: accuracy_figure(rows, "Accuracy by attention"),
        "kernels": lambda: accuracy_figure(kernels, "Accuracy by kernel"),
        "contexts": lambda: contexts_figure(content["contexts"]),
    }
    planned = [*settings["masked"], *settings["causal"]]
    repeated = sum(attention not in settings["once"] for attention in planned)
    wanted = len(planned) + (len(settings["seeds"]) - 1) * repeated
    failed = [run for run in content["runs"] if "failure" in run]
    compared = [run for run in content["runs"] if run["experiment"] == "comparison"]
    done = sum(run not in failed for run in compared)
    parts = [
        f"# Attention on proteins: {settings['data_name']}, preset {settings['preset']}",
        f"{done} of {wanted} runs of the comparison are done. Accuracy and perplexity "
        "per residue, all of them hidden behind the mask token under the masked objective.",
        *(
            f"{label(run['attention'])}, {OBJECTIVES[run['objective']]}, seed {run['seed']}: no "
            f"result; {run['failure'].partition(';')[0]}."
            for run in failed
        ),
    ]
    for name, table in tables(content).items():
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
    """The results of a study so far, from its files, with means over seeds."""

    def read(path: Path) -> Any:
        return read_json(path) if path.exists() else {}

    long, settings = output / "concatenated", read_json(output / "study.json")
    runs = [read_json(path) for path in sorted(output.glob("runs/*/result.json"))]
    done = [run for run in runs if "failure" not in run]
    compared = [run for run in done if run["experiment"] == "comparison"]
    ablated = [run for run in done if run["experiment"] == "kernels"]
    # The runs of the comparison that the ablation is compared with.
    beside = [
        run
        for run in compared
        if run["objective"] == "mlm"
        and run["attention"] in ("favor-relu", "favor-softmax")
        and run["seed"] in settings["kernel_seeds"]
    ]
    rows = summarise(compared, list(dict.fromkeys([*settings["masked"], *settings["causal"]])))
    kernels = ["favor-relu", "favor-softmax", *settings["kernels"]]
    return {
        "settings": settings,
        "runs": runs,
        "summary": rows,
        "claims": claims(rows),
        "kernels": summarise([*beside, *ablated], kernels) if ablated else [],
        "plan": read(long / "plan.json"),
        "concatenated": {x.parent.name: read_json(x) for x in sorted(long.glob("*/result.json"))},
        "contexts": read(output / "contexts.json").get("rows", []),
        "learnt": read(output / "learnt" / "learnt.json"),
    }


def _brief(content: Mapping[str, Any]) -> dict[str, Any]:
    """The results without what was scored on each sequence, which stays in the folders of runs."""

    def without(found: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value
            for name, value in found.items()
            if name != "counts" and not name.endswith("_by_sequence")
        }

    brief: dict[str, Any] = json.loads(json.dumps(content), object_hook=without)
    return brief


def _splits_table(splits: Mapping[str, Mapping[str, int]]) -> Table:
    """Sequences, residues and clusters of the splits of a corpus."""
    counts = ("sequences", "residues", "clusters")
    rows = [(name, *(f"{split[count]:,}" for count in counts)) for name, split in splits.items()]
    return Table(("split", *counts), rows)


def _accuracy_table(rows: Sequence[Row]) -> Table:
    """Accuracy and perplexity of every split, mean ± sd over seeds, with the unigram baseline."""
    splits = list(rows[0]["scores"]) if rows else []
    cells = [(split, metric) for split in splits for metric in METRICS]
    factors = {"accuracy": 100.0, "perplexity": 1.0}
    lines: list[tuple[str, ...]] = []
    for number, row in enumerate(rows):
        objective = OBJECTIVES[row["objective"]]
        if number == 0 or rows[number - 1]["objective"] != row["objective"]:
            baseline = (f"{factors[m] * row['baseline'][s][m]:.2f}" for s, m in cells)
            lines.append((objective, "unigram baseline", *baseline, "", "", ""))
        lines.append(
            (
                objective,
                label(row["attention"]),
                *(spread_text(row["scores"][s][m], factor=factors[m]) for s, m in cells),
                spread_text(row["seconds"], 0) if row["seconds"] else "",
                f"{row['parameters']:,}" if row["parameters"] else "",
                f"{row['scores'][splits[0]]['accuracy']['seeds']}",
            )
        )
    headings = (f"{s} {m}{' %' if m == 'accuracy' else ''}" for s, m in cells)
    columns = ("objective", "attention", *headings, "training, s", "parameters", "seeds")
    return Table(columns, lines, names=2)


def _claims_table(found: Sequence[Mapping[str, Any]]) -> Table:
    """The paper's claims as measured."""
    rows = []
    for claim in found:
        difference, interval = claim["difference"], claim["interval"]
        sign = "+" if difference["mean"] >= 0 else ""
        asked = f"{'>' if claim['strict'] else '≥'} {claim['least']:g}"
        rows.append(
            (
                claim["claim"],
                f"{sign}{spread_text(difference)}",
                "{:+.2f} to {:+.2f}".format(*interval) if interval else "",
                asked,
                f"{difference['seeds']}",
                claim["verdict"],
            )
        )
    return Table(("claim", "measured", "95% interval", "asked", "seeds", "verdict"), rows)


def _concatenated_table(plan: Mapping[str, Any], done: Mapping[str, Any]) -> Table:
    """Models on rows of concatenated proteins: cost of a step, and scores at equal time."""
    rows = []
    for name, entry in plan.items():
        cost, options, result = entry["cost"], entry["options"], done.get(name)
        cells = [name, cost["failure"] or f"{cost['seconds']:.2f}", nbytes(cost["peak_bytes"])]
        cells += [str(options["num_layers"]), f"{options['steps']:,}"] if options else ["", ""]
        cells += [f"{result['seconds']:.0f}"] if result else [""] * 5
        for split in ("test", "ood"):
            if result:
                scores = result["scores"][split]
                cells += [f"{100 * scores['accuracy']:.2f}", f"{scores['perplexity']:.2f}"]
        rows.append(tuple(cells))
    header = (
        *("model", "step, s", "memory of a step", "layers", "steps", "training, s"),
        *("test accuracy %", "test perplexity", "ood accuracy %", "ood perplexity"),
    )
    return Table(header, rows)


def _contexts_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Seconds and memory of a forward pass, attention by length."""
    named = ({"tokens": row["length"], "name": label(row["attention"]), **row} for row in rows)
    return pivot(
        named,
        ("tokens",),
        "name",
        lambda row: row["failure"] or f"{row['seconds']:.2f} s, {nbytes(row['peak_bytes'])}",
    )


def _similarity_table(models: Mapping[str, Any]) -> Table:
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
                shown = ("" if x is None else f"{x:.3g}" for x in values)
                rows.append((label(name), kind, matrix, *shown, f"{part['heads']}"))
    header = ("model", "read from", "matrix", "Pearson", "Spearman", "p", "heads")
    return Table(header, rows, names=3)


def _pairs_table(models: Mapping[str, Any]) -> Table:
    """The most similar pairs, and the rank of those that biochemistry would expect."""
    rows = []
    for name, numbers in models.items():
        part = (numbers["similarity"] or {}).get("all", {})
        if "top_pairs" in part:
            expected = (f"{x['pair']} {x['rank']} of {x['of']}" for x in part["expected_pairs"])
            top = ", ".join(pair["pair"] for pair in part["top_pairs"])
            rows.append((label(name), top, ", ".join(expected)))
    return Table(("model", "most similar pairs", "rank of the expected pairs"), rows, names=3)


@styled
def accuracy_figure(rows: Sequence[Row], title: str) -> Figure:
    """A point per seed, a bar at the mean, the unigram baseline as a line; a panel an objective."""
    objectives = list(dict.fromkeys(row["objective"] for row in rows))
    tallest = max(sum(row["objective"] == objective for row in rows) for objective in objectives)
    figure = new_figure((5.4 * len(objectives), 1.2 + 0.42 * tallest))
    axes = figure.subplots(1, len(objectives), squeeze=False)[0]
    for ax, objective in zip(axes, objectives, strict=True):
        shown = [row for row in rows if row["objective"] == objective]
        for number, (split, colour) in enumerate(_COLOURS.items()):
            baseline = 100 * shown[0]["baseline"][split]["accuracy"]
            ax.axvline(baseline, color=colour, linestyle=":", linewidth=1)
            for place, row in enumerate(shown):
                found = row["scores"][split]["accuracy"]
                height = place + 0.16 * (2 * number - 1)
                values = [100 * value for value in found["values"].values()]
                ax.plot(values, [height] * len(values), "o", color=colour, markersize=4, alpha=0.6)
                ax.plot([100 * found["mean"]], [height], "|", color=colour, markersize=14, mew=2)
        ax.set_yticks(range(len(shown)), [label(row["attention"]) for row in shown])
        ax.invert_yaxis()
        ax.set_xlabel("accuracy, %")
        style(ax, OBJECTIVES[objective])
    for split, colour in _COLOURS.items():
        axes[-1].plot([], [], "o", color=colour, label=split)
    axes[-1].plot([], [], ":", color=MUTED, label="unigram baseline")
    axes[-1].legend(loc="best")
    figure.suptitle(title)
    return figure


@styled
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
    axes[0].legend()
    return figure
