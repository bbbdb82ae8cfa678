"""Order of launches: forward and backward pass, and the step of one position."""

import math

import torch
import triton
from torch import Tensor

from performers.attention.operators import Gradients, Inputs
from performers.attention.triton import bidirectional, causal, exact_pairs
from performers.attention.triton.kernels import step as kernels
from performers.attention.triton.launcher import Launcher, Sums, as_bytes, on_device, rowwise
from performers.attention.triton.operators import (
    Results,
    StepResults,
    Upstream,
    has_exact_pairs,
    new_gradients,
    new_results,
    new_step,
)


def forward(inputs: Inputs) -> Results:
    """The results of a call."""
    with on_device(inputs.query.device):
        return _forward(Launcher(inputs))


def _forward(launcher: Launcher) -> Results:
    inputs, results = launcher.inputs, new_results(launcher.inputs)
    rows = (results.out, results.log_normaliser)
    exact = has_exact_pairs(inputs)
    if exact:
        rows = launcher.new_rows()
    sweeps = causal.sweeps(launcher, results.key_norm)
    if sweeps:
        for sweep in sweeps:
            bidirectional.key_norms(launcher, sweep.norms, sweep.delay, sweep.reverse)
        _sweep_rows(launcher, sweeps, rows, results)
    else:
        bidirectional.key_norms(launcher, results.key_norm[0])
        total = bidirectional.total_sums(launcher, results.key_norm[0])
        bidirectional.read_rows(launcher, total, *rows)
        results = results._replace(
            key_value=total.key_value, key_sum=total.key_sum, log_scale=total.scale
        )
    if exact:
        out, log = results.out, results.log_normaliser
        exact_pairs.exact_rows(launcher, PART_OUT=rows[0], PART_LOG=rows[1], OUT=out, LOG=log)
    return results


def _sweep_rows(
    launcher: Launcher, sweeps: list[causal.Sweep], rows: tuple[Tensor, Tensor], results: Results
) -> None:
    """Rows through features, by one or two causal passes, and the state after the first."""
    past, _ = causal.past_sums(launcher)
    # What the first pass hands on to the second.
    part = launcher.new_rows() if len(sweeps) > 1 else None
    for heads in causal.parts_of_heads(launcher):
        start = None if past is None else Sums(*(heads.of(x) for x in past))
        before, last = causal.states(launcher, sweeps[0], heads, start)
        causal.chunk_rows(launcher, sweeps[0], heads, before, (*(part or rows), results.lost[0]))
        if launcher.inputs.return_state:
            causal.copy_state(launcher, heads, last, results)
        if part is not None:
            before, _ = causal.states(launcher, sweeps[1], heads, None)
            causal.chunk_rows(launcher, sweeps[1], heads, before, (*rows, results.lost[1]), part)


def backward(upstream: Upstream, inputs: Inputs, results: Results) -> Gradients:
    """The gradients of a call."""
    with on_device(inputs.query.device):
        return _backward(Launcher(inputs), upstream, results)


def _backward(launcher: Launcher, upstream: Upstream, results: Results) -> Gradients:
    gradients = new_gradients(launcher.inputs)
    grad_out = rowwise(upstream.grad_out)
    delta, log, feature_log = bidirectional.row_terms(launcher, results, grad_out)
    sweeps = causal.sweeps(launcher, results.key_norm)
    exact = has_exact_pairs(launcher.inputs)
    row_terms = {"GRAD_OUT": grad_out, "DELTA": delta, "LOG": feature_log}
    added = gradients
    if exact or len(sweeps) > 1:
        # Several passes add to these.
        added = gradients._replace(
            **{
                name: torch.zeros_like(getattr(gradients, name), dtype=torch.float32)
                for name in ("query", "key", "value")
            }
        )
    if sweeps:
        _sweep_gradients(launcher, sweeps, upstream, row_terms, results, added)
    else:
        total = Sums(results.key_value, results.key_sum, results.log_scale)
        bidirectional.query_gradients(launcher, row_terms, total, added.query)
        of_sums = bidirectional.total_gradients(launcher, row_terms, total.scale)
        norms = results.key_norm[0]
        bidirectional.key_gradients(launcher, norms, total.scale, of_sums, added.key, added.value)
    if exact:
        exact_pairs.exact_gradients(launcher, {**row_terms, "LOG": log}, added)
    for to, x in zip(gradients[:3], added[:3], strict=True):
        if to is not x:
            to.copy_(x)
    return gradients


def _sweep_gradients(
    launcher: Launcher,
    sweeps: list[causal.Sweep],
    upstream: Upstream,
    row_terms: dict[str, Tensor],
    results: Results,
    gradients: Gradients,
) -> None:
    """Gradients through features by one or two causal passes."""
    past, factor = causal.past_sums(launcher)
    final = causal.final_gradients(launcher, upstream)
    add = has_exact_pairs(launcher.inputs) or len(sweeps) > 1
    for heads in causal.parts_of_heads(launcher):
        start = None if past is None else Sums(*(heads.of(x) for x in past))
        last = None if final is None else (heads.of(final[0]), heads.of(final[1]))
        for sweep, lost in zip(sweeps, results.lost, strict=True):
            before, _ = causal.states(launcher, sweep, heads, start)
            if last is not None:
                last = causal.at_scale(launcher, last, before.scale)
            after, first = causal.gradient_states(
                launcher, sweep, heads, row_terms, before.scale, last
            )
            causal.chunk_gradients(
                launcher, sweep, heads, row_terms, lost, before, after, gradients, add
            )
            start = last = None
            if factor is not None:
                causal.copy_past_gradients(heads, first, factor, gradients)


def step(inputs: Inputs) -> StepResults:
    """The results of a single position."""
    results = new_step(inputs)
    with on_device(inputs.query.device):
        launcher = Launcher(inputs)
        blocks = launcher.blocks("decode_step")
        columns = min(launcher.widths[1], blocks.rows)
        if launcher.count < 2 * launcher.processors:
            columns = 16
        past = (inputs.past_key_value, inputs.past_key_sum, inputs.past_log_scale)
        # By position: the time of a step is that of this launch.
        launcher.launch(
            kernels.decode_step,
            launcher.count * -(-launcher.value_dim // columns),
            launcher.query, launcher.key, launcher.value, as_bytes(inputs.key_mask),
            inputs.weight.contiguous(), None if inputs.bias is None else inputs.bias.contiguous(),
            *(None if x is None else x.contiguous() for x in past), *results,
            *launcher.query.stride()[:3], *launcher.key.stride()[:2],
            *launcher.value.stride()[:2], *results.out.stride()[:3],
            launcher.heads, launcher.groups, inputs.weight.shape[-2],
            math.sqrt(inputs.scale), launcher.pull / 2,
            D=launcher.head_dim, DV=launcher.value_dim, BD=launcher.widths[0], BV=columns,
            BW=launcher.widths[1], BG=triton.next_power_of_2(launcher.groups), BM=blocks.features,
            PER_HEAD=inputs.weight.shape[0] > 1,
            HAS_BIAS=inputs.bias is not None,
            HAS_MASK=inputs.key_mask is not None,
            HAS_PAST=inputs.past_key_value is not None,
            FORM=inputs.kind, EPSILON=inputs.epsilon,
            blocks=blocks,
        )  # fmt: skip
    return results
