"""Attention heads like real ones: near keys matter, the first key too, few directions."""

import torch

from performers.planning import Setting


def structured(*, batch=4, heads=2, key_heads=None, length=96, head_dim=16, seed=0):
    """Queries, keys and values of sequences of one kind; ``seed`` draws the sequences alone."""
    key_heads = key_heads or heads
    kind, random = (torch.Generator().manual_seed(x) for x in (99, seed))
    spectrum = (1 / torch.arange(1, head_dim + 1)).sqrt()
    steps = torch.randn(batch, length, head_dim, generator=random)
    hidden = [steps[:, 0]]
    for step in steps.unbind(1)[1:]:
        hidden.append(0.9 * hidden[-1] + (1 - 0.9**2) ** 0.5 * step)
    hidden = torch.stack(hidden, dim=1).unsqueeze(1)
    rotation = torch.linalg.qr(torch.randn(heads, head_dim, head_dim, generator=kind))[0] * spectrum
    first = torch.randn(head_dim, generator=kind)
    first = first / first.norm()

    def noise(count):
        return torch.randn(batch, count, length, head_dim, generator=random)

    query = 3 * hidden @ rotation + 0.5 * noise(heads) + 2 * first
    key = 3 * hidden @ rotation[:: heads // key_heads] + 0.5 * noise(key_heads)
    key[:, :, 0] = 5 * first
    value = hidden @ torch.randn(key_heads, head_dim, head_dim, generator=kind) + noise(key_heads)
    return query, key, value


def anisotropic(power, *, batch=4, heads=2, length=256, head_dim=64):
    """Gaussian vectors with covariance eigenvalues ``~ 1 / i`` and ``E|x|^2 = power``."""
    random = torch.Generator().manual_seed(0)
    spectrum = 1 / torch.arange(1, head_dim + 1)
    widths = (power * spectrum / spectrum.sum()).sqrt()
    shape = (batch, heads, length, head_dim)
    return tuple(torch.randn(shape, generator=random) * width for width in (widths, widths, 1.0))


def setting(error, seconds, **options):
    """A made-up measurement."""
    measured = {"head_errors": (error,), "timed": True, "ratio": seconds, "multiply_adds": 1.0}
    options = {"num_features": 64, "estimator": "data_aware", **measured, **options}
    return Setting(**options, error=error, seconds=seconds)


def exact(query, key, value, *, scale=None, is_causal=False, key_mask=None):
    """Softmax attention written out, float64."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(groups, dim=1) for x in (key, value))
    logits = query.double() @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None], -torch.inf)
    if is_causal:
        logits = logits.masked_fill(torch.ones_like(logits).tril() == 0, -torch.inf)
    return logits.softmax(-1).nan_to_num(0) @ value


def weights(query, key, **options):
    """The attention matrix."""
    identity = torch.eye(key.shape[2], dtype=torch.float64).expand(*key.shape[:2], -1, -1)
    return exact(query, key, identity, **options)


def relative(out, target):
    """``|out - target| / |target|``, one for each sequence."""
    return (out - target).double().flatten(1).norm(dim=1) / target.double().flatten(1).norm(dim=1)
