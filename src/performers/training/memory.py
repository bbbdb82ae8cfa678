"""Memory that a training needs at least, and memory of the machine."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from performers.app.errors import UserError
from performers.features.base import resolve_num_features
from performers.models import PerformerConfig
from performers.models.registry import ATTENTIONS

# Python's and torch's bookkeeping for the modules and tensors of a block; some 30,000 are measured.
_BLOCK_OVERHEAD = 20_000
_FLOAT32 = 4
_CGROUPS = Path("/sys/fs/cgroup")


def check_training_memory(
    config: PerformerConfig, optimizer: str, tokens: int, share: float
) -> None:
    """Refuse a training that no memory of this machine can hold; see `training_bytes`.

    Raises:
        UserError: The least memory that the training needs exceeds that of the processor and that
            of all accelerators together.
    """
    needed = training_bytes(config, optimizer, tokens, share)
    available = machine_bytes()
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        available = max(
            available, sum(torch.cuda.get_device_properties(i).total_memory for i in devices)
        )
    if needed <= available:
        return
    what = "weights, gradients, the optimiser's state and random features"
    lower = "--layers, --hidden-size, --intermediate-size, --num-features or --max-length"
    if tokens:
        what += f", activations of {tokens:,} tokens"
        lower += ", or --batch-tokens, or train with --gradient-checkpointing or --reversible"
    raise UserError(
        f"a model of {parameter_count(config):,} parameters needs at least {_size(needed)} of "
        f"memory to train ({what}), and this machine has {_size(available)}; lower {lower}"
    )


def training_bytes(
    config: PerformerConfig, optimizer: str, tokens: int = 0, share: float = 1.0
) -> int:
    """Memory that a training step needs at least.

    A lower bound: weights, gradients and the optimiser's state, which is two numbers a weight for
    AdamW and one for Muon, random features, and what the norms, the linear layers and the
    activation of each block keep for the backward pass.

    Args:
        config: The model.
        optimizer: ``"adamw"`` or ``"muon"``.
        tokens: Tokens of a batch in float32; 0 counts no activations.
        share: Part of weights, gradients and state that is on this machine where several share
            them; each begins and ends with whole weights.
    """
    layers = config.num_hidden_layers
    copies = max(1.0, share * (3 if optimizer == "muon" else 4))
    numbers = int(parameter_count(config) * copies)
    # A projection is drawn in float64.
    numbers += (layers + 2) * _feature_count(config)
    if not config.reversible:
        # Inputs of both norms, of three linear layers, and of the activation and the last of them.
        inner = 0 if config.chunk_size_feed_forward else 2 * config.intermediate_size
        numbers += layers * tokens * (5 * config.hidden_size + inner)
    return _FLOAT32 * numbers + _BLOCK_OVERHEAD * layers


def parameter_count(config: PerformerConfig) -> int:
    """Parameters of a model without its head and those of registered attentions."""
    width, inner = config.hidden_size, config.intermediate_size
    parts = 2 if ATTENTIONS[config.attention].shares_query else 3
    block = (parts + 1) * (width * width + width) + 2 * width * inner + inner + 5 * width
    positions = sum(config.axial_shape or ())
    if config.position_embedding == "learned":
        positions = config.max_position_embeddings
    return config.num_hidden_layers * block + (config.vocab_size + positions + 2) * width


def machine_bytes() -> int:
    """Memory of this machine, or of the container that this process is in where that is less."""
    limits: list[int] = [psutil.virtual_memory().total]
    for file in _limits():
        # There may be no such group here, or its limit is "max".
        with suppress(OSError, ValueError):
            limits.append(int(file.read_text(encoding="ascii")))
    return min(limits)


def _limits() -> Iterator[Path]:
    """The files with the memory limits of the process's Linux control groups."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            top, name = _CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = _CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        # A limit holds for all groups within; in a container the path may be that of the host.
        below = Path(group.lstrip("/"))
        yield from (top / folder / name for folder in (below, *below.parents))


def _feature_count(config: PerformerConfig) -> int:
    """Numbers in the projection of one layer."""
    if not config.attention.startswith("favor"):
        return 0
    features = resolve_num_features(config.head_dim, config.num_features or None)
    # A row of a two-sided estimator makes two features.
    rows = features // 2 if config.estimator in ("hyperbolic", "trigonometric") else features
    return rows * config.head_dim


def _size(nbytes: int) -> str:
    """Bytes in words."""
    value = float(nbytes)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} PB"
