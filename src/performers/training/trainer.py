"""Trainer of a run that is one pass over its batches: data, optimizer, validations, divergence."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, Sampler, default_collate

from performers.app.errors import Diverged
from performers.training.callbacks import TimeLimitCallback
from performers.training.optimizers import MuonAdamW
from performers.training.parallel import ParallelTrainer

if TYPE_CHECKING:
    from performers.training.run import TrainingRun


def shuffled_epochs(size: int, seed: int) -> Iterator[int]:
    """The indices below ``size`` again and again, each epoch in an order of its own."""
    for epoch in itertools.count():
        yield from np.random.default_rng((seed, epoch)).permutation(size).tolist()


class ShuffledBatches(Sampler[list[int]]):
    """Batches of a fixed number of indices, each epoch in an order of its own.

    Batches of ``rows`` of ``size`` examples, over as many epochs as they need, are a function of
    the seed alone, so that a run resumes by skipping batches.
    """

    def __init__(self, size: int, *, rows: int, seed: int, num_batches: int) -> None:
        if min(size, rows) < 1:
            raise ValueError(f"size and rows must be at least 1, got {size} and {rows}")
        self.size, self.rows, self.seed, self.num_batches = size, rows, seed, num_batches

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        indices = shuffled_epochs(self.size, self.seed)
        for _ in range(self.num_batches):
            yield list(itertools.islice(indices, self.rows))


class RunTrainer(ParallelTrainer):
    """Trainer whose run is one pass over a sampler of batches, so that to resume is to skip.

    By default a batch is ``batch_tokens // max_length`` rows of the data set in random order, and
    its items are dictionaries of tensors of one shape; subclasses change that in ``sampler`` and
    ``collate``. A loss or weights that are not finite raise ``Diverged``.

    Args:
        run: The run, whose options, arguments and trackers are the trainer's.
        model: The model.
        dataset: Examples by the keys that the sampler yields.
        measure: Returns the metrics of a model, which are logged as ``eval_...`` at validations;
            None without a validation set.
    """

    def __init__(
        self,
        *,
        run: TrainingRun,
        model: Any,
        dataset: Any,
        measure: Callable[[nn.Module], Mapping[str, float]] | None,
    ) -> None:
        self.options = options = run.options
        self.measure = measure
        self.limit = None
        if options.time_limit is not None:
            self.limit = TimeLimitCallback(
                options.time_limit,
                saves=options.save_steps is None,
                validates=options.eval_steps is None,
            )
        if options.gradient_checkpointing:
            older = model.gradient_checkpointing_enable
            # The older name warns where there is the newer one.
            getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})
        super().__init__(
            model=model,
            args=run.arguments,
            callbacks=run.trackers,
            train_dataset=dataset,
            eval_dataset=dataset,
            data_collator=self.collate,
        )
        if self.limit is not None:
            self.add_callback(self.limit)

    def sampler(self, batches: int) -> Sampler[Any]:
        """The first so many batches of keys of the run, a function of the options alone."""
        dataset: Any = self.train_dataset
        rows = self.options.batch_tokens // self.options.max_length
        return ShuffledBatches(len(dataset), rows=rows, seed=self.options.seed, num_batches=batches)

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch of a list of examples."""
        batch: dict[str, Tensor] = default_collate(examples)
        return batch

    def first_batch(self) -> dict[str, Tensor]:
        """The first batch of the run."""
        dataset: Any = self.train_dataset
        return self.collate([dataset[key] for key in next(iter(self.sampler(1)))])

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The whole run as one pass."""
        dataset: Any = self.train_dataset
        arguments = self.args
        readers = arguments.world_size // self.options.sequence_parallel
        batches = arguments.max_steps * arguments.gradient_accumulation_steps * readers
        loader = DataLoader(
            dataset,
            batch_sampler=self.sampler(batches),
            collate_fn=self.data_collator,
            # A separate generator, so that making an iterator draws nothing from dropout's.
            generator=torch.Generator().manual_seed(self.options.seed),
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's AdamW, or Muon."""
        if self.options.optimizer == "muon" and getattr(self, "optimizer", None) is None:
            self.optimizer = MuonAdamW(
                self.accelerator.unwrap_model(self.model),
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        return super().create_optimizer(*args, **kwargs)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """Trainer's linear schedule, at most the share of the time limit that is left."""
        limit = self.limit
        if limit is None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            if step < warmup:
                linear = step / warmup
            else:
                linear = (num_training_steps - step) / max(1, num_training_steps - warmup)
            return max(0.0, min(linear, 1 - limit.share))

        scheduler = LambdaLR(optimizer or self.optimizer, factor)
        self.lr_scheduler, self._created_lr_scheduler = scheduler, True
        return scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on one batch; a loss that is not finite raises ``Diverged``."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise _diverged(f"the loss became {loss.item()} at", self.state.global_step + 1)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Metrics of the model as it is, logged as ``eval_...``; those of a step are kept."""
        if self.measure is None:
            return {}
        for entry in reversed(self.state.log_history):
            if entry.get("step") == self.state.global_step and "eval_loss" in entry:
                return {name: value for name, value in entry.items() if name.startswith("eval_")}
        with self.whole_rows():
            metrics = self.measure(self.accelerator.unwrap_model(self.model))
        logged = {f"eval_{name}": float(value) for name, value in metrics.items()}
        self.log(dict(logged))
        return logged

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        weights = self.model.parameters()
        if not all(bool(torch.isfinite(weight).all()) for weight in weights):
            raise _diverged("the weights are not finite after", self.state.global_step)
        super()._save_checkpoint(*args, **kwargs)


def _diverged(what: str, step: int) -> Diverged:
    return Diverged(
        f"{what} step {step}; lower --learning-rate or raise --warmup-steps and train anew, or "
        "--resume from the last checkpoint with the same options if the machine was at fault"
    )
