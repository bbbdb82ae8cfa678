"""Time of a training run, estimated before its first step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from performers.app.progress import duration

_FEWEST_BATCHES = 50


class EstimateCallback(TrainerCallback):
    """Announces how long a run takes, from the time of its first batch.

    The batch is run twice, forward and backward, and timed the second time. Gradients and random
    states are as before afterwards, so the run's numbers do not depend on it. Short runs, and runs
    of several processes, are not announced.
    """

    def __init__(
        self,
        trainer: Trainer,
        batch: Callable[[], dict[str, Tensor]],
        announce: Callable[[str], None],
    ) -> None:
        self.trainer = trainer
        self.batch = batch
        self.announce = announce

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Time a batch."""
        steps = state.max_steps - state.global_step
        batches = steps * args.gradient_accumulation_steps
        if args.world_size > 1 or batches < _FEWEST_BATCHES:
            return
        seconds = self._seconds()
        self.announce(
            f"about {duration(batches * seconds)} for {steps:,} steps, at {seconds:.2g} s a batch; "
            "validations and checkpoints come on top"
        )

    def _seconds(self) -> float:
        model, accelerator = self.trainer.model, self.trainer.accelerator
        inputs = {name: value.to(accelerator.device) for name, value in self.batch().items()}
        accelerated = accelerator.device.type == "cuda"
        seconds = 0.0
        # fork_rng restores the states of CUDA devices too.
        with torch.random.fork_rng(), self.trainer.compute_loss_context_manager():
            for _ in range(2):
                begun = time.perf_counter()
                with accelerator.autocast():
                    loss = self.trainer.compute_loss(model, inputs)
                loss.backward()
                if accelerated:
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - begun
        model.zero_grad(set_to_none=True)
        return seconds
