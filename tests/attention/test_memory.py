"""Memory grows with the inputs, not with the features or the square of the length."""

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.attention.cases import LINEAR, POSITIVE, SELF, exhaustive, law, make_call

pytestmark = pytest.mark.usefixtures("small_blocks")

HEADS, HEAD_DIM, NUM_FEATURES = 8, 8, 256
# The shorter fills the blocks that are held at a time.
SHORT, LONG = 512, 1536
PLAIN, EXACT = {}, {"window": 32, "sinks": 4}


def peak_elements(function):
    """The most float32 elements that ``function`` held at once, beyond what was there before.

    Follows every allocation of torch's CPU allocator, in the backward pass and inside kernels
    too, which hooks on saved tensors would miss.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    held = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 4


def call_of(mode, length, options, packed=False):
    if packed:
        options = {**options, "cu_seqlens": torch.arange(0, length + 1, length // 8)}
    sizes = {"batch": 1, "heads": HEADS, "head_dim": HEAD_DIM, "num_features": NUM_FEATURES}
    return make_call(POSITIVE, length, mode, **sizes, **options)


@pytest.mark.parametrize(
    ("mode", "packed", "options"),
    [
        ("bidirectional", False, PLAIN),
        ("causal", False, EXACT),
        exhaustive("causal", False, PLAIN),
        exhaustive("bidirectional", True, PLAIN),
        exhaustive("bidirectional", False, EXACT),
        exhaustive("bidirectional", True, EXACT),
        exhaustive("causal", True, EXACT),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", LINEAR)
def test_forward_and_backward_store_no_features(backend, mode, packed, options):
    """Three times the length: the difference is a few times the inputs, far less than features.

    So it is with what autograd saves.
    """
    peaks, saved = [], []
    for length in (SHORT, LONG):
        call, sizes = call_of(mode, length, options, packed).leaves(), []

        def run(call=call, sizes=sizes):
            def pack(x):
                sizes.append(x.numel())
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                out = call.run(backend)
            out.sum().backward()

        peaks.append(peak_elements(run))
        saved.append(sum(sizes))
    short, long = peaks
    features = HEADS * NUM_FEATURES * (LONG - SHORT)
    assert long - short < features * (1 if options else 0.46), peaks
    assert long < 3.5 * short, peaks
    assert saved[1] < HEADS * LONG * NUM_FEATURES * (1 if options else 0.5), saved
    assert saved[1] <= 3.5 * max(saved[0], 3 * HEADS * HEAD_DIM * SHORT), saved


@pytest.mark.exhaustive
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [PLAIN, EXACT], ids=str)
@law(backends=LINEAR, modes=SELF)
def test_inference_holds_one_block(backend, mode, options, packed):
    """Without gradients: a few tensors of the size of the output, and a working set."""
    peaks = []
    for length in (SHORT, LONG):
        call = call_of(mode, length, options, packed)
        with torch.no_grad():
            peaks.append(peak_elements(lambda call=call: call.run(backend)))
    outputs = HEADS * HEAD_DIM * (LONG - SHORT)
    assert peaks[1] - peaks[0] < (24 if options or packed else 5) * outputs, peaks


@law(backends=LINEAR, modes=["bidirectional", exhaustive("causal")])
def test_a_wide_window_holds_no_square(backend, mode):
    """Pairs within the window may be held block by block only."""
    window = 256
    call = call_of(mode, LONG, {"window": window, "sinks": 4})
    with torch.no_grad():
        peak = peak_elements(lambda: call.run(backend))
    assert peak < HEADS * LONG * window, peak
