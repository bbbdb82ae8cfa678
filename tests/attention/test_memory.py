"""Memory of a forward and backward pass grows with the inputs, not with the features."""

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.attention.cases import TESTED, make_call
from tests.features.cases import by_name

HEADS, HEAD_DIM, NUM_FEATURES = 8, 8, 256
SHORT, LONG = 2048, 6144


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


def training_step(backend, mode, length, packed):
    options = {}
    if packed:
        options["cu_seqlens"] = torch.arange(0, length + 1, length // 8)
    call = make_call(
        by_name("positive"),
        length,
        mode,
        batch=1,
        heads=HEADS,
        head_dim=HEAD_DIM,
        num_features=NUM_FEATURES,
        **options,
    ).leaves()
    return lambda: call.run(backend).sum().backward()


@pytest.mark.parametrize(
    ("mode", "packed"), [("bidirectional", False), ("causal", False), ("bidirectional", True)]
)
@pytest.mark.parametrize("backend", TESTED)
def test_forward_and_backward_store_no_features(backend, mode, packed):
    """Three times the length: what is added is a few times the inputs, far less than features."""
    short, long = (
        peak_elements(training_step(backend, mode, length, packed)) for length in (SHORT, LONG)
    )
    inputs = 3 * HEADS * HEAD_DIM * (LONG - SHORT)
    features = HEADS * NUM_FEATURES * (LONG - SHORT)
    assert long - short < 10 * inputs, (short, long)
    assert long - short < features / 2, (short, long)
    assert long < 3.5 * short


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

        call = make_call(
            by_name("positive"),
            length,
            mode,
            batch=1,
            heads=HEADS,
            head_dim=HEAD_DIM,
            num_features=NUM_FEATURES,
        ).leaves()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = call.run(backend)
        saved.append(counted)
        out.sum().backward()
    assert saved[1] < HEADS * LONG * NUM_FEATURES / 2
    assert saved[1] <= 3.5 * max(saved[0], 3 * HEADS * HEAD_DIM * SHORT)


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("backend", TESTED)
def test_inference_holds_one_block(backend, mode):
    """Without gradients only the inputs, the output and a working set of fixed size."""
    peaks = []
    for length in (SHORT, LONG):
        call = make_call(
            by_name("positive"),
            length,
            mode,
            batch=1,
            heads=HEADS,
            head_dim=HEAD_DIM,
            num_features=NUM_FEATURES,
        )
        with torch.no_grad():
            peaks.append(peak_elements(lambda call=call: call.run(backend)))
    outputs = HEADS * HEAD_DIM * (LONG - SHORT)
    assert peaks[1] - peaks[0] < 5 * outputs, peaks
