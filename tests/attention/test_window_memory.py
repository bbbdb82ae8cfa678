"""Memory with windows and sinks grows with the length, not with its square or the features."""

import pytest
import torch

from tests.attention.cases import TESTED, make_call
from tests.attention.test_memory import HEAD_DIM, HEADS, NUM_FEATURES, peak_elements
from tests.features.cases import by_name

# The shorter fills the blocks that are held at a time.
SHORT, LONG = 2048, 4096
MODES = [("bidirectional", False), ("causal", False), ("bidirectional", True), ("causal", True)]


def call_of(mode, length, window, packed=False):
    options = {"window": window, "sinks": 4}
    if packed:
        options["cu_seqlens"] = torch.arange(0, length + 1, length // 8)
    return make_call(
        by_name("positive"),
        length,
        mode,
        batch=1,
        heads=HEADS,
        head_dim=HEAD_DIM,
        num_features=NUM_FEATURES,
        **options,
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize(("mode", "packed"), MODES)
@pytest.mark.parametrize("backend", TESTED)
def test_forward_and_backward(backend, mode, packed):
    """Twice the length adds less than its features would take, far less than pairs."""
    peaks = []
    for length in (SHORT, LONG):
        call = call_of(mode, length, 32, packed).leaves()
        peaks.append(peak_elements(lambda call=call: call.run(backend).sum().backward()))
    short, long = peaks
    assert long - short < HEADS * NUM_FEATURES * (LONG - SHORT), peaks
    assert long < 2.2 * short, peaks


@pytest.mark.exhaustive
@pytest.mark.parametrize(("mode", "packed"), MODES)
@pytest.mark.parametrize("backend", TESTED)
def test_inference(backend, mode, packed):
    """Without gradients: a few tensors of the size of the output, and a working set."""
    peaks = []
    for length in (SHORT, LONG):
        call = call_of(mode, length, 32, packed)
        with torch.no_grad():
            peaks.append(peak_elements(lambda call=call: call.run(backend)))
    outputs = HEADS * HEAD_DIM * (LONG - SHORT)
    assert peaks[1] - peaks[0] < 24 * outputs, peaks


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("backend", TESTED)
def test_what_autograd_saves_is_linear(backend, mode):
    saved = []
    for length in (SHORT, LONG):
        counted = 0

        def pack(x):
            nonlocal counted
            counted += x.numel()
            return x

        call = call_of(mode, length, 32).leaves()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = call.run(backend)
        saved.append(counted)
        out.sum().backward()
    assert saved[1] < HEADS * LONG * NUM_FEATURES
    assert saved[1] <= 2.2 * max(saved[0], 3 * HEADS * HEAD_DIM * SHORT)


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("backend", TESTED)
def test_a_wide_window_holds_no_square(backend, mode):
    """Pairs within the window may be held block by block only."""
    window = 512
    call = call_of(mode, LONG, window)
    with torch.no_grad():
        peak = peak_elements(lambda: call.run(backend))
    assert peak < HEADS * LONG * window, peak
