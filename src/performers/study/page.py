"""The study as one page, a file of tables, and figures, as far as there are results."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from performers.app.figures import Pictures
from performers.app.files import read_json, write_atomically
from performers.study import html_page as page
from performers.study.comparison import results
from performers.study.study_figures import accuracy_figure, contexts_figure
from performers.study.summary import claims, summarise
from performers.study.tables import (
    OBJECTIVES,
    Table,
    accuracy_table,
    claims_table,
    concatenated_table,
    contexts_table,
    label,
    pairs_table,
    similarity_table,
)


def write_study_report(output: Path) -> Path:
    """Write ``tables.md``, ``figures/`` and ``report.html`` from the results in a study's folder.

    Args:
        output: The folder of the study.

    Returns:
        The path of the page.
    """
    settings = read_json(output / "study.json")
    pictures = Pictures(output / "figures")
    title = f"Attention on proteins: {settings['data_name']}, preset {settings['preset']}"
    parts = [page.heading(1, title)]
    tables: list[Table] = []

    def add(table: Table) -> None:
        tables.append(table)
        parts.append(page.table(table.header, table.rows, names=table.names, caption=table.caption))

    ended = list(results(output / "runs"))
    done = [run for run in ended if "failure" not in run]
    compared = [run for run in done if run["experiment"] == "comparison"]
    order = list(dict.fromkeys([*settings["masked"], *settings["causal"]]))
    rows = summarise(compared, order)
    planned = [*settings["masked"], *settings["causal"]]
    repeated = sum(attention not in settings["once"] for attention in planned)
    wanted = len(planned) + (len(settings["seeds"]) - 1) * repeated
    notes = [
        f"{len(compared)} of {wanted} runs of the comparison are done. Accuracy and perplexity "
        "per residue, all of them hidden behind the mask token under the masked objective.",
        *(
            f"{label(run['attention'])}, {OBJECTIVES[run['objective']]}, seed {run['seed']}: no "
            f"result; {run['failure'].partition(';')[0]}."
            for run in ended
            if "failure" in run
        ),
    ]
    parts += map(page.paragraph, notes)
    if rows:
        parts.append(page.heading(2, "Attentions compared"))
        add(accuracy_table(rows, "Same data order, steps and settings; mean ± sd over seeds."))
        uri = pictures.add("accuracy", accuracy_figure(rows, "Accuracy by attention"))
        parts.append(page.image(uri, "Accuracy of every attention, a point per seed."))
        verdicts = claims(rows)
        if verdicts:
            add(claims_table(verdicts))
    _kernels(settings, done, parts, pictures, add)
    _long(output, parts, pictures, add)
    _learnt(output, parts, add)
    parts.append(page.heading(2, "Settings"))
    shown = {**settings, **settings["training"]}
    parts.append(
        page.table(
            (),
            [(key, value) for key, value in shown.items() if not isinstance(value, dict)],
            names=2,
        )
    )
    text = "\n".join([*(f"{note}\n" for note in notes), *(t.markdown() for t in tables)])
    write_atomically(output / "tables.md", f"# {title}\n\n{text}".encode())
    report = output / "report.html"
    write_atomically(report, page.page(title, "\n".join(parts)).encode())
    return report


def _kernels(
    settings: dict[str, Any], done: list[Any], parts: list[str], pictures: Pictures, add: Any
) -> None:
    ablated = [run for run in done if run["experiment"] == "kernels"]
    if not ablated:
        return
    seeds = set(settings["kernel_seeds"])
    beside = [
        run
        for run in done
        if run["experiment"] == "comparison"
        and run["objective"] == "mlm"
        and run["attention"] in ("favor-relu", "favor-softmax")
        and run["seed"] in seeds
    ]
    order = ["favor-relu", "favor-softmax", *settings["kernels"]]
    rows = summarise([*beside, *ablated], order)
    parts.append(page.heading(2, "Kernels"))
    add(accuracy_table(rows, "Generalized attention: the kernel function of the features."))
    uri = pictures.add("kernels", accuracy_figure(rows, "Accuracy by kernel"))
    parts.append(page.image(uri, "Accuracy of every kernel function."))


def _long(output: Path, parts: list[str], pictures: Pictures, add: Any) -> None:
    plan_file, contexts_file = output / "concatenated" / "plan.json", output / "contexts.json"
    if plan_file.exists() or contexts_file.exists():
        parts.append(page.heading(2, "Long contexts"))
    if plan_file.exists():
        found = {run["name"]: run for run in results(output / "concatenated")}
        add(concatenated_table(read_json(plan_file), found))
    if contexts_file.exists():
        rows = read_json(contexts_file)["rows"]
        add(contexts_table(rows))
        uri = pictures.add("contexts", contexts_figure(rows))
        parts.append(page.image(uri, "Time and memory of a forward pass against length."))


def _learnt(output: Path, parts: list[str], add: Any) -> None:
    file = output / "learnt" / "learnt.json"
    if not file.exists():
        return
    found = read_json(file)
    parts.append(page.heading(2, "What the masked models learnt"))
    add(similarity_table(found["models"]))
    add(pairs_table(found["models"]))
    for name, path in found["figures"].items():
        data = base64.b64encode((output / "learnt" / path).read_bytes()).decode("ascii")
        parts.append(page.image(f"data:image/png;base64,{data}", f"Figure: {name}."))
