"""The ``triton`` backend: which calls the kernels take, and how they are put to them."""

import importlib.util
import logging
import os

import torch
from torch import Tensor

from performers.attention.call import AttentionCall
from performers.attention.operators import Inputs, kernel_kind
from performers.attention.state import FavorState
from performers.attention.torch_backend import backend as torch_backend
from performers.attention.triton.operators import triton_forward, triton_step
from performers.features.recomputation import is_traced, is_transformed

# Triton's interpreter runs the kernels on the CPU, for tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INSTALLED = importlib.util.find_spec("triton") is not None
_LEAST_CAPABILITY = (8, 0)
# What has room in registers and shared memory.
_LARGEST_HEAD_DIM = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 64}
_told: set[str] = set()


def available() -> bool:
    """True if Triton is installed and there is a GPU that it serves."""
    if not _INSTALLED:
        return False
    return _INTERPRETED or (torch.cuda.is_available() and _serves(torch.device("cuda")))


def _serves(device: torch.device) -> bool:
    return torch.version.hip is None and (
        torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
    )


# To torch.compile these are constants of the machine: it need not trace what asks the driver.
available._dynamo_marked_constant = True  # type: ignore[attr-defined]
_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]


def tell_unused(uncovered: str | None) -> None:
    """Say once why calls on a GPU run without these kernels: they do not cover one, or cannot run.

    A warning, because that is the lowest level that Python shows unasked.
    """
    if torch.compiler.is_compiling():
        return
    if uncovered is not None:
        reason = f"{uncovered}, which the triton backend does not cover"
    elif _INSTALLED:
        reason = "below compute capability 8.0, the least of the triton backend"
    else:
        reason = 'without Triton: pip install "performers[triton]" for faster kernels'
    if reason not in _told:
        _told.add(reason)
        logging.getLogger("performers").warning("the torch backend runs calls on a GPU %s", reason)


def attend(call: AttentionCall) -> tuple[Tensor, FavorState | None]:
    """Attention and, when asked for, the state after the last key.

    Args:
        call: A call that the kernels cover.

    Returns:
        Output of shape ``(batch, key_heads, groups, L, value_dim)`` in the dtype of the inputs, and
        the state or None.
    """
    if 0 in call.query.shape or 0 in call.value.shape:
        # Nothing is summed: zeros of the right shapes, and their graph.
        return torch_backend.attend(call)
    dtype = _input_dtype(call)
    query, key, value = (x.to(dtype) for x in (call.query, call.key, call.value))
    call = call.replaced(query=query, key=key, value=value)
    inputs = Inputs.of(call)
    summed = [call.key, call.value]
    if call.sink_keys is not None:
        summed += [call.sink_keys.key, call.sink_keys.value]
    if call.state is not None:
        summed += [call.state.key_value, call.state.key_sum]
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (call.query, *summed))
    if (
        call.is_causal
        and call.query.shape[-2] == 1
        and not (differentiated or call.has_exact_pairs() or call.segments is not None)
    ):
        out, *sums = triton_step(*inputs)
    else:
        out, _, _, _, *sums = triton_forward(*inputs)
    if not call.return_state:
        return out, None
    if not any(x.requires_grad for x in summed):
        # All results of an operator want gradients if one does; these have none to hand on.
        sums = [x.detach() for x in sums]
    return out, FavorState(sums[0], sums[1], sums[2].detach())


def _input_dtype(call: AttentionCall) -> torch.dtype:
    dtype = torch.promote_types(call.query.dtype, call.key.dtype)
    return torch.promote_types(dtype, call.value.dtype)


def uncovered(call: AttentionCall) -> str | None:
    """Reason why the kernels cannot compute a call, or None."""
    device = call.query.device
    if device.type != ("cpu" if _INTERPRETED else "cuda"):
        return f"for inputs on {device}"
    if device.type == "cuda" and not _serves(device):
        return f"for inputs on {device}, a GPU below compute capability 8.0"
    if call.dtype != torch.float32:
        return f"for {call.dtype} inputs"
    return _uncovered_features(call) or _uncovered_options(call)


def _uncovered_features(call: AttentionCall) -> str | None:
    form = call.form
    if form.kind == "trigonometric":
        return "for trigonometric features"
    if kernel_kind(form) is None:
        return "for elementwise features of another function than relu, abs, elu + 1 and sigmoid"
    tensors = (form.weight, form.bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return "for features whose projection is trained"
    return None


def _uncovered_options(call: AttentionCall) -> str | None:
    dtype = _input_dtype(call)
    most = _LARGEST_HEAD_DIM[dtype]
    if max(call.query.shape[-1], call.value.shape[-1]) > most:
        return f"for {dtype} inputs with a head_dim or value_dim above {most}"
    # Custom operators have no derivative inside vmap, grad and their like, nor forward-mode ones.
    if is_transformed():
        return "inside transforms of torch.func and forward-mode differentiation"
    if torch.compiler.is_exporting() or is_traced():
        return "while a graph is exported"
    return None
