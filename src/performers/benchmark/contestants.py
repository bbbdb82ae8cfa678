"""The attention functions that are compared, all with one signature."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from performers import backends, favor_attention
from performers.benchmark import flops, third_party
from performers.benchmark.workload import Workload

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From query, key and value, each ``(batch, heads, length, head_dim)``, to the same shape."""

SDPA = "SDPA"
IDENTITY = "identity"
PERFORMER_PYTORCH = "performer-pytorch"
FAST_TRANSFORMERS = "fast-transformers"
FLA = "fla"


@dataclass(frozen=True)
class Contestant:
    """One way to compute attention.

    Attributes:
        name: What tables call it.
        build: From a workload and whether attention is causal to the function.
        forward_flops: Operations of a forward pass, from a workload, the length and whether it is
            causal; None where counting says nothing.
        growth: Time grows with the length to this power.
        backend: The name of our backend, or None for the others.
        absence: Why it cannot run here, or None.
    """

    name: str
    build: Callable[[Workload, bool], Attention]
    forward_flops: Callable[[Workload, int, bool], int] | None
    growth: int = 1
    backend: str | None = None
    absence: str | None = None


def contestants() -> dict[str, Contestant]:
    """Everything that ``performers benchmark attention`` knows, by name, in the order of tables.

    Our backends are those usable here, without the quadratic reference. Libraries that are not
    installed are among them, with the reason in ``absence``.
    """
    found = [
        Contestant(f"performers {name}", favor(name), _favor_flops, backend=name)
        for name in backends()
        if name != "reference"
    ]
    found += [
        Contestant(SDPA, _sdpa, _exact_flops, growth=2),
        Contestant(IDENTITY, _identity, None),
        Contestant(
            PERFORMER_PYTORCH,
            third_party.performer_pytorch,
            _prefix_flops,
            absence=third_party.absence("performer_pytorch"),
        ),
        Contestant(
            FAST_TRANSFORMERS,
            third_party.fast_transformers,
            _hyperbolic_flops,
            absence=third_party.absence("fast_transformers"),
        ),
        Contestant(FLA, third_party.fla, None, absence=third_party.fla_absence()),
    ]
    return {contestant.name: contestant for contestant in found}


def favor(backend: str) -> Callable[[Workload, bool], Attention]:
    """Our attention through a named backend.

    Args:
        backend: One of ``performers.backends()``.

    Returns:
        What ``Contestant.build`` is.
    """

    def build(workload: Workload, is_causal: bool) -> Attention:
        feature_map = workload.feature_map()

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return favor_attention(
                query, key, value, feature_map, is_causal=is_causal, backend=backend
            )

        return attend

    return build


def _sdpa(workload: Workload, is_causal: bool) -> Attention:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)

    return attend


def _identity(workload: Workload, is_causal: bool) -> Attention:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # A copy: the least that anything which writes an output of its own can do.
        return value.clone()

    return attend


def _favor_flops(workload: Workload, length: int, is_causal: bool) -> int:
    return flops.favor_forward(
        length=length,
        num_features=workload.num_features,
        head_dim=workload.head_dim,
        heads=workload.heads,
        batch=workload.batch,
        is_causal=is_causal,
    )


def _exact_flops(workload: Workload, length: int, is_causal: bool) -> int:
    return flops.exact_forward(
        length=length,
        head_dim=workload.head_dim,
        heads=workload.heads,
        batch=workload.batch,
        is_causal=is_causal,
    )


def _prefix_flops(workload: Workload, length: int, is_causal: bool) -> int:
    # Prefix sums position by position: the same products, causal or not.
    return _favor_flops(workload, length, False)


def _hyperbolic_flops(workload: Workload, length: int, is_causal: bool) -> int:
    count = _prefix_flops(workload, length, is_causal)
    if workload.features == "softmax":
        # Half as many projections, each used with both signs.
        count -= count // 4
    return count
