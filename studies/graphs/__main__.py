"""``python -m studies.graphs``: attention on molecules and on the graph of Debian's packages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

from performers.app.errors import UserError
from performers.app.options import OptionError, option
from performers.cli.commands import App
from performers.cli.interrupts import end_at_once
from studies.parts import Measures, StudyOptions, extent, fingerprint, run_parts, section

SECTIONS = ("molecules", "debian", "scaling")

app = App()


@dataclass(frozen=True, kw_only=True)
class GraphsOptions(StudyOptions):
    """Options of the study."""

    data: str | None = extent(
        "Folder of the wheel of molsets and of debian.npz; see the README.", None, path=True
    )
    quick: bool = extent("A size of seconds, to see that it runs.", False)
    sections: tuple[str, ...] = extent(
        f"Some of {', '.join(SECTIONS)}.", SECTIONS, choices=SECTIONS
    )
    seeds: int = option("Number of seeds, from 0.", 3, at_least=1)
    layers: int = option("Layers on molecules; packages have 2.", 3, at_least=1)
    train: int = option("Molecules in training.", 10_000, at_least=64)
    test: int = option("Molecules in validation, and in the test.", 1000, at_least=1)
    epochs: int = option("Passes over the molecules.", 3, at_least=1)
    steps: int = option("Training steps on packages.", 12, at_least=1)
    nodes: tuple[int, ...] = option(
        "Numbers of nodes in the section scaling, rising.",
        (1024, 4096, 16384, 65536),
        rising=True,
    )
    exact_up_to: int = option("Most nodes of exact attention in the section scaling.", 4096)

    def __post_init__(self) -> None:
        """Check that the data of the sections are given."""
        super().__post_init__()
        needed = [name for name in ("molecules", "debian") if name in self.sections]
        if needed and self.data is None:
            raise OptionError(f"--data is needed for the section {needed[0]}")


@app.command(extra="benchmark")
def graphs(options: GraphsOptions) -> None:
    """Compare attention on molecules and packages, and its time and memory."""
    import torch

    try:
        from studies.graphs import debian, models, molecules, scaling, training
    except ImportError as error:
        raise UserError(f"the study needs torch_geometric: {error}") from error
    from performers.app.figures import save_figure
    from studies.graphs.report import scaling_figure, tables

    torch.set_num_threads(1)
    if options.quick:
        options = replace(options, seeds=1, train=64, test=8, epochs=1, steps=2, nodes=(64,))
    parts: Measures = {}
    data: dict[str, str] = {}
    folder = Path(options.data or "")
    if "molecules" in options.sections:
        wheels = sorted(folder.glob("molsets-*.whl"))
        if find_spec("rdkit") is None:
            raise UserError("the section molecules needs rdkit: pip install rdkit")
        if not wheels:
            raise UserError(f"--data {folder} has no molsets-*.whl: pip download --no-deps molsets")
        data["molecules"] = fingerprint(wheels[-1])
        sizes = (options.train, options.test, options.test)
        # Read when a part needs them, once.
        read = cache(partial(molecules.read_molecules, wheels[-1], sizes))
        for name in models.ATTENTIONS:
            for seed in range(options.seeds):
                parts[f"molecules, {name}, seed {seed}"] = partial(
                    training.train_molecules, read, name, options.layers, options.epochs, seed
                )
    if "debian" in options.sections:
        file = folder / "debian.npz"
        data["debian"] = fingerprint(file)
        task = cache(lambda: debian.node_task(debian.load_packages(file)))
        for seed in range(options.seeds):
            for name in models.NODE_MODELS:
                parts[f"debian, {name}, seed {seed}"] = partial(
                    training.train_nodes, task, name, options.steps, seed
                )
    if "scaling" in options.sections:
        for nodes in options.nodes:
            exact = nodes <= options.exact_up_to
            parts[f"scaling, {nodes} nodes"] = partial(scaling.measure_scaling, nodes, exact=exact)
    done = run_parts(options, parts, tables, data=data)
    if section(done, "scaling"):
        save_figure(scaling_figure(done), options.output_folder / "scaling.png")


if __name__ == "__main__":
    end_at_once()
    app()
