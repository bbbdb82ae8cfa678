"""Training of causal models of texts, whose segments may hand their state on, exactly resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from performers.app.errors import UserError
from performers.app.provenance import weights_sha256
from performers.features import FeatureMap
from performers.models import PerformerForCausalLM
from performers.models.arguments import CACHE_KEYWORD
from performers.models.cache import PerformerCache
from performers.streams.evaluation import evaluate_texts
from performers.streams.segments import Segments, StreamSegments
from performers.streams.subwords import byte_tokenizer, load_tokenizer, write_subwords
from performers.streams.text import Texts, find_texts, read_bytes
from performers.training.options import TrainingOptions
from performers.training.run import ReportStep, TrainingRun
from performers.training.trainer import RunTrainer

_VALIDATED_AT_MOST = 1 << 18
_TOKENS = ("tokens", "validation_tokens")


def train_texts(
    paths: Sequence[Path],
    output: Path,
    options: TrainingOptions,
    *,
    tokenizer: Path | None = None,
    validation: Sequence[Path] | None = None,
    start: Path | None = None,
    resume: bool = False,
    progress: ReportStep | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train a causal model on texts and save it, its tokenizer, its log and its options.

    Args:
        paths: Files of texts, or folders of them.
        output: Folder to write to; see ``prepare_output_folder``.
        options: Options of the run: ``max_length`` is the length of a segment, of which a batch has
            ``batch_tokens // max_length``.
        tokenizer: A ``tokenizer.json`` or its folder; None for bytes.
        validation: Texts to validate on, other ones (about 262,144 tokens, at equal distances);
            without them whole texts of ``paths``, drawn with the seed, with at most
            ``options.validation_fraction`` of the tokens, or the end of a single one.
        start: Folder of a model whose weights and features the run begins with.
        resume: Continue the run in ``output``.
        progress: Called with the step, the steps in all and the latest log entry.
        announce: Called with lines on files that are left out, on a validation that holds out
            nothing, and on the time of the run.

    Returns:
        See ``TrainingRun.train``; the metrics are those of ``evaluate_texts``.

    Raises:
        UserError: The texts or options cannot be used, see ``TrainingRun``.
    """
    _check_options(options)
    if tokenizer is None:
        coder: PreTrainedTokenizerBase = byte_tokenizer(options.max_length)
    else:
        coder = load_tokenizer(tokenizer, options.max_length)

    def read(files: Sequence[Path], name: str) -> Texts:
        if tokenizer is None:
            return read_bytes(files, announce)
        return write_subwords(files, coder, output / name, announce)

    files, others = find_texts(paths), find_texts(validation or ())
    both = {file.resolve() for file in files} & {file.resolve() for file in others}
    if both:
        raise UserError(f"--validation {min(both)} is trained on too; validate on other texts")
    texts = read(files, _TOKENS[0])
    if validation:
        held_out = read(others, _TOKENS[1])
    else:
        texts, held_out = texts.split(options.validation_fraction, options.seed)
        if options.validation_fraction and not held_out.documents:
            announce(
                f"--validation-fraction {options.validation_fraction:g} holds out no text (whole "
                "ones are taken, of a single one the end); give --validation, or a larger fraction"
            )
    data: dict[str, Any] = {
        "texts": len(texts.documents),
        "bytes": texts.size,
        "tokens": texts.tokens,
        "validation_texts": len(held_out.documents),
        "sha256": f"{texts.fingerprint()}{held_out.fingerprint()}",
    }
    if start is not None:
        data["start"] = weights_sha256(start)
        data["sha256"] += data["start"] or ""
    run = TrainingRun(output, data, options, resume=resume, before=_TOKENS)

    def measure(model: nn.Module) -> dict[str, float]:
        found = evaluate_texts(
            model,
            held_out,
            length=options.max_length,
            carry=options.carry_state,
            rows=options.batch_tokens // options.max_length,
            tokens_at_most=_VALIDATED_AT_MOST,
        )
        del found["places"]
        return found

    def trainer() -> TextTrainer:
        model = PerformerForCausalLM(options.model_config(coder))
        if start is not None:
            model.load_state_dict(PerformerForCausalLM.from_pretrained(start).state_dict())
        dataset = Segments(texts, options.max_length)
        validates = measure if held_out.documents else None
        return TextTrainer(run=run, model=model, dataset=dataset, measure=validates)

    return run.train(trainer, coder, progress=progress, announce=announce)


class TextTrainer(RunTrainer):
    """Trainer on segments; with ``carry_state`` each goes on from the one before it in its row.

    Gradients end where a segment begins (truncated back-propagation). A row forgets the past where
    a text begins, and all rows do after a redraw of the features, whose sums are of another draw.
    """

    past: PerformerCache | None = None
    _versions: list[int] | None = None

    def sampler(self, batches: int) -> Sampler[Any]:
        """Streams, or segments from anywhere."""
        options = self.options
        if not options.carry_state:
            return super().sampler(batches)
        dataset: Any = self.train_dataset
        return StreamSegments(
            dataset.texts.lengths,
            options.max_length,
            rows=options.batch_tokens // options.max_length,
            seed=options.seed,
            num_batches=batches,
            processes=self.args.world_size,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Loss of a batch, after the past of its rows."""
        inputs = dict(inputs)
        begins = inputs.pop("begins")
        if not self.options.carry_state:
            inputs["use_cache"] = False
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        past = self._present_past()
        if past is not None:
            past.forget_(begins)
        inputs |= {CACHE_KEYWORD: past, "use_cache": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.past = getattr(outputs, CACHE_KEYWORD).detach_()
        return (loss, outputs) if return_outputs else loss

    def _present_past(self) -> PerformerCache | None:
        """The past, or None if features were redrawn since."""
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        versions = [part.version for part in model.modules() if isinstance(part, FeatureMap)]
        if versions != self._versions:
            self.past, self._versions = None, versions
        return self.past

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.options.carry_state:
            past = self._present_past()
            state = None if past is None else past.state_dict()
            torch.save(state, self._past_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if not self.options.carry_state or checkpoint is None:
            return
        # Marks the features as those that the state is of.
        self.past, self._versions = None, None
        self._present_past()
        device = self.args.device
        state = torch.load(self._past_file(checkpoint), weights_only=True, map_location=device)
        if state is not None:
            model: Any = self.accelerator.unwrap_model(self.model)
            self.past = model.performer.new_cache()
            self.past.load_state_dict(state)

    def _past_file(self, folder: str) -> Path:
        return Path(folder, f"past_{self.args.process_index}.pth")


def _check_options(options: TrainingOptions) -> None:
    """Refuse options that are of sequences and would change nothing here."""
    if options.objective != "clm":
        raise UserError("texts are trained on with --objective clm")
    for flag, given in (
        ("--packed", options.packed),
        ("--across-sequences", options.across_sequences),
        ("--families", options.families),
        ("--family-power", options.family_power),
    ):
        if given:
            raise UserError(f"{flag} is for sequences (FASTA); leave it out for texts")
    if options.sharded:
        raise UserError(
            "--fsdp and --sequence-parallel are for sequences (FASTA); leave them out for texts"
        )
