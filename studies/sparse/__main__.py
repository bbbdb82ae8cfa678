"""``python -m studies.sparse``: four claims about sparse attention, measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from performers.app.errors import UserError
from performers.cli.commands import App
from performers.cli.interrupts import end_at_once
from studies.parts import Measures, Part, StudyOptions, extent, fingerprint, run_parts

QUICK: dict[str, dict[str, Any]] = {
    "reach": {"length": 64, "keys": 8, "sources": 4},
    "times": {"length": 64, "keys": 8, "heads": 2, "head_dim": 8, "rounds": 2, "steps": (64, 128)},
    "training": {"depths": (1,), "length": 32, "keys": 6, "steps": 2, "rows": 2, "test_rows": 4},
    "pretrained": {
        "length": 32, "passages": 1, "keys": 8, "budgets": (4, 8), "counts": (16,), "layers": (0,),
        "draws": 1,
    },
}  # fmt: skip
"""Changes of sizes that run in seconds."""

app = App()


@dataclass(frozen=True, kw_only=True)
class SparseOptions(StudyOptions):
    """Options of the study."""

    quick: bool = extent("Sizes of seconds, to see that it runs.", False)
    encoder: str | None = extent("Pretrained encoder: a folder.", None, path=True)
    decoder: str | None = extent("Pretrained decoder: a folder or GGUF file.", None, path=True)
    calibration: str | None = extent("Text that estimators are fitted to.", None, path=True)
    text: str | None = extent("Text that models are measured on.", None, path=True)
    seeds: int = extent("Seeds of the trained models.", 3, at_least=1)

    def __post_init__(self) -> None:
        """Check that models come with texts."""
        super().__post_init__()
        models = self.encoder is not None or self.decoder is not None
        if models and (self.calibration is None or self.text is None):
            raise UserError("--encoder and --decoder need --calibration and --text")


@app.command()
def sparse(options: SparseOptions) -> None:
    """Compare Performers with sparse attention: times, reach, depth, pretrained models."""
    import torch

    from performers.app.figures import save_figure
    from studies.sparse import attentions, pretrained, reach, report, tasks, times, training

    torch.set_num_threads(1)
    sizes: dict[str, Any] = {
        "reach": reach.ReachSize(),
        "times": times.TimeSize(),
        "training": training.TrainingSize(),
        "pretrained": pretrained.PretrainedSize(),
    }
    if options.quick:
        sizes = {name: replace(size, **QUICK[name]) for name, size in sizes.items()}
    trained, models = sizes["training"], sizes["pretrained"]

    def reached(name: str) -> Part:
        count = partial(reach.keys_per_query, name)
        return {
            **reach.measure_reach(name, sizes["reach"]),
            "long": count(models.length, models.keys, is_causal=False),
            "short": count(trained.length, trained.keys, is_causal=True),
        }

    data: dict[str, str] = {}
    parts: Measures = {"times": partial(times.measure_times, sizes["times"])}
    parts |= {f"reach, {name}": partial(reached, name) for name in attentions.ALL}
    for kind, path in (("encoder", options.encoder), ("decoder", options.decoder)):
        if path is not None:
            assert options.calibration is not None
            assert options.text is not None
            calibration, text = Path(options.calibration), Path(options.text)
            model = pretrained.Pretrained(path, calibration, text, models)
            data[kind] = fingerprint(path, calibration, text)
            parts |= {f"{kind}, {name}": partial(model.measure, name) for name in pretrained.ALL}
            if kind == "encoder":
                data["errors"] = data[kind]
                names = (attentions.SOFTMAX, pretrained.FITTED, *attentions.PATTERNS)
                parts |= {f"errors, {name}": partial(model.errors, name) for name in names}
    for name in attentions.ALL:
        parts[f"step, {name}"] = partial(times.measure_step, name, sizes["times"])
    for seed, depth in product(range(options.seeds), trained.depths):
        for task, name in product(tasks.TASKS, attentions.ALL):
            train = partial(training.train, task, name, depth, seed, trained)
            parts[f"{task}, {name}, depth {depth}, seed {seed}"] = train
    settings = {name: asdict(size) for name, size in sizes.items()}
    done = run_parts(options, parts, report.tables, settings=settings, data=data)
    save_figure(report.draw_steps(done), options.output_folder / "steps.svg")


if __name__ == "__main__":
    end_at_once()
    app()
