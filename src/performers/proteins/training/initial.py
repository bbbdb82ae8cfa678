"""Training that begins with the weights of a trained model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from performers.app.errors import UserError
from performers.app.files import read_json
from performers.app.options import Declaration, OptionError
from performers.app.provenance import weights_sha256
from performers.models import PerformerConfig
from performers.proteins.embedded import model_folder
from performers.proteins.inputs.tokenizer import build_protein_tokenizer
from performers.proteins.model_folder import load_model
from performers.training.options import TrainingOptions

_MECHANISM = ".mechanism."
_ARCHITECTURE: dict[str, Declaration] = {
    item.name: item.metadata["option"]
    for item in fields(TrainingOptions)
    if "option" in item.metadata and item.metadata["option"].config
}


def initial_options(
    initial: Path | None, given: Mapping[str, Any], *, resumed: Path | None = None
) -> dict[str, Any]:
    """Options of the architecture that a run takes from its initial model, by their names.

    Args:
        initial: Folder of the model, or ``performers-protein-small``; None for random weights.
        given: Options that were given, by their names.
        resumed: Folder of a run to continue, whose record then takes the model's place.

    Raises:
        UserError: The folder holds no model, or a given option contradicts its architecture.
    """
    record = resumed and resumed / "training.json"
    if record and record.exists():
        earlier = read_json(record)
        if not isinstance(earlier, dict) or not earlier.get("initial_model"):
            return {}
        values = earlier.get("options", {})
        found = {name: values[name] for name in _ARCHITECTURE if name in values}
    elif initial is not None:
        config = _load(initial)[0].config
        _check(config, given)
        found = {
            name: getattr(config, str(declared.config)) for name, declared in _ARCHITECTURE.items()
        }
    else:
        return {}
    return {name: value for name, value in found.items() if name not in given}


def initial_record(initial: Path) -> dict[str, Any]:
    """Name of an initial model, and the SHA-256 of its weights."""
    folder = model_folder(initial)
    return {"name": folder.resolve().name, "sha256": weights_sha256(folder)}


def load_initial_weights(network: PreTrainedModel, initial: Path, options: TrainingOptions) -> None:
    """Load weights and random features of a trained model into the network of a run.

    A network with a window over positions, where the other has none, has the other's features in
    both halves of the heads.

    Raises:
        UserError: The folder holds no model, or one of another architecture or vocabulary.
    """
    trained, vocabulary = _load(initial)
    before, config = trained.config, network.config
    _check(before, {**options.to_dict(), "intermediate_size": config.intermediate_size})
    free = {declared.config for declared in _ARCHITECTURE.values() if declared.keeps_weights}
    for name in sorted(PerformerConfig.__annotations__.keys() - free - {"use_cache"}):
        wanted, found = getattr(config, name, None), getattr(before, name, None)
        if wanted != found:
            raise UserError(
                f"--initial-model: {initial} has {name}={found}, for which there is no option "
                f"(here {wanted}); give a model that performers train wrote"
            )
    if vocabulary != build_protein_tokenizer().get_vocab():
        raise UserError(
            f"--initial-model: the vocabulary of {initial} is not that of proteins; give a model "
            "that performers train wrote"
        )
    weights = trained.state_dict()
    if before.position_window is None and config.position_window is not None:
        weights = {
            name.replace(_MECHANISM, _MECHANISM + half): tensor
            for name, tensor in weights.items()
            for half in ("near.", "across.")
        }
    network.load_state_dict(weights)


def _load(initial: Path) -> tuple[PreTrainedModel, dict[str, int]]:
    try:
        model, tokenizer = load_model(model_folder(initial), device="cpu", dtype="float32")
    except UserError as error:
        raise UserError(f"--initial-model: {error}") from error
    return model, tokenizer.get_vocab()


def _check(config: Any, given: Mapping[str, Any]) -> None:
    """Check options, by their names, against the configuration of a trained model."""
    objective = "clm" if config.is_decoder else "mlm"
    if (wanted := given.get("objective", "mlm")) != objective:
        raise OptionError(
            f"--objective must be that of --initial-model, got --objective {wanted}; give "
            f"--objective {objective}"
        )
    for name in filter(given.__contains__, _ARCHITECTURE):
        declared, wanted = _ARCHITECTURE[name], given[name]
        found = getattr(config, str(declared.config))
        fixed = (
            not declared.keeps_weights
            or (name == "max_length" and config.longest_input is not None)
            or (name == "position_window" and wanted is None)
        )
        if fixed and wanted != found:
            flag = TrainingOptions.flag(name)
            raise OptionError(
                f"{flag} must be that of --initial-model, {found}; got {wanted}; leave out {flag}"
            )
