"""Calibration on a fixed sample, and the calibrated features written a second time."""

import torch
from torch import Tensor

from performers.features import FeatureMap, LearnedFeatures, SoftmaxFeatures

SAMPLE_SEED = 1234
# Sides of different power, off centre: balance, centre and widths all have something to do.
QUERY_POWER, KEY_POWER = 0.6, 1.2


def sample(
    head_dim: int, heads: int = 1, *, batch: int = 2, length: int = 24, seed: int = SAMPLE_SEED
) -> tuple[Tensor, Tensor]:
    """Queries and keys, ``(batch, heads, length, head_dim)``, float64, for ``scale=1``.

    Correlated in another way in each head, along few directions more than along others, and not
    centred.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64, device="cpu")

    spectrum = 1 / torch.arange(1, head_dim + 1, dtype=torch.float64, device="cpu")
    sides = []
    for power, widths in ((QUERY_POWER, spectrum), (KEY_POWER, spectrum.flip(0))):
        mixing = widths.sqrt().unsqueeze(-1) * normal(heads, head_dim, head_dim)
        mixing = mixing * (power / mixing.square().sum((-2, -1), keepdim=True)).sqrt()
        mean = 0.3 * normal(heads, 1, head_dim) / head_dim**0.5
        sides.append(normal(batch, heads, length, head_dim) @ mixing + mean)
    return sides[0], sides[1]


def calibrate(feature_map: SoftmaxFeatures) -> SoftmaxFeatures:
    """The map fitted to the sample; on the meta device, where there is nothing to fit, as it is."""
    if feature_map.weight.device.type != "meta":
        feature_map.calibrate_(*sample(feature_map.head_dim, feature_map.num_heads or 1), scale=1.0)
    return feature_map


def learned(head_dim: int, num_features: int | None = None, **options: object) -> LearnedFeatures:
    """Trained features, some steps away from the ``data_aware`` ones that they started from."""
    source = SoftmaxFeatures(head_dim, num_features, estimator="data_aware", **options)
    feature_map = LearnedFeatures(calibrate(source))
    with torch.no_grad():
        feature_map.weight.mul_(0.9)
        feature_map.bias.add_(
            0.2 * torch.arange(feature_map.num_features, device=feature_map.bias.device).sin()
        )
    return feature_map


def log_calibrated(
    feature_map: FeatureMap, x: Tensor, *, is_query: bool = False
) -> tuple[Tensor, Tensor]:
    """``phi(x) = (N(w; 0, I) / N(w; c, T T^T))^{1/2} exp(w . x - |x|^2 / 2) / sqrt(m)``.

    With the map's own, rounded ``log |det T|``.
    """
    draws, center, transform = (
        _per_head(tensor, x)
        for tensor in (feature_map.weight, feature_map.center, feature_map.transform)
    )
    rows = torch.einsum("hij,hmj->hmi", transform, draws) + center.unsqueeze(1)
    covariance = transform @ transform.mT
    offset = rows - center.unsqueeze(1)
    within = torch.einsum("hmi,hij,hmj->hm", offset, torch.linalg.inv(covariance), offset)
    log_proposal = -within / 2 - _per_head(feature_map.log_volume, x).unsqueeze(-1)
    log_standard = -rows.square().sum(-1) / 2
    return _log_exponential(
        feature_map, x, rows, (log_standard - log_proposal) / 2, is_query=is_query
    )


def log_learned(
    feature_map: FeatureMap, x: Tensor, *, is_query: bool = False
) -> tuple[Tensor, Tensor]:
    """``phi(x) = exp(w . x + b - |x|^2 / 2) / sqrt(m)`` with the parameters ``w`` and ``b``."""
    rows, bias = (_per_head(tensor, x) for tensor in (feature_map.weight, feature_map.bias))
    return _log_exponential(feature_map, x, rows, bias, is_query=is_query)


def _log_exponential(
    feature_map: FeatureMap, x: Tensor, rows: Tensor, bias: Tensor, *, is_query: bool
) -> tuple[Tensor, Tensor]:
    matrix = feature_map.query_transform if is_query else feature_map.key_transform
    x = torch.einsum("hij,bhtj->bhti", _per_head(matrix, x), x)
    log = torch.einsum("bhtd,hmd->bhtm", x, rows) + bias.unsqueeze(1)
    log = log - x.square().sum(-1, keepdim=True) / 2
    scaled = log - torch.tensor(float(log.shape[-1]), dtype=torch.float64).log() / 2
    return scaled, torch.ones_like(log)


def _per_head(tensor: Tensor, x: Tensor) -> Tensor:
    """A map's tensor in float64, one for each head of ``x``."""
    tensor = tensor.detach().double()
    return tensor.repeat_interleave(x.shape[1] // tensor.shape[0], dim=0)
