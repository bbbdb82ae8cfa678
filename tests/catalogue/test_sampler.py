import math

import pytest
import torch

from performers.catalogue import CatalogueSampler, sampled_softmax_loss
from performers.catalogue.items import balanced_blocks

CATALOGUES = {
    "clusters": lambda: torch.randn(20, 8).repeat_interleave(15, 0) + 0.2 * torch.randn(300, 8),
    "without clusters": lambda: torch.randn(301, 5),
    "duplicates": lambda: torch.randn(3, 4).repeat(33, 1),
    "a huge item": lambda: torch.cat((torch.randn(99, 6), torch.full((1, 6), 1e18))),
    "one": lambda: torch.randn(1, 3),
    "two": lambda: torch.randn(2, 3),
}


@pytest.fixture(params=CATALOGUES)
def items(request):
    torch.manual_seed(0)
    return CATALOGUES[request.param]()


@pytest.fixture
def sampler(items):
    return CatalogueSampler(items, scale=1.3)


@pytest.fixture
def query(items):
    return torch.randn(12, items.shape[1])


def everything(sampler, query):
    return torch.arange(sampler.num_items).expand(*query.shape[:-1], -1)


def softmax(sampler, items, query):
    return (sampler.scale * query.double() @ items.double().T).log_softmax(-1)


def test_blocks_share_items_evenly(items):
    for blocks in {1, 2 ** (int(math.log2(len(items))) // 2), 2 ** int(math.log2(len(items)))}:
        ids = balanced_blocks(items, blocks, None)
        sizes = (ids >= 0).sum(1)
        assert ids.shape[0] == blocks
        assert sizes.max() - sizes.min() <= 1
        assert sizes.min() >= 1
        assert torch.equal(ids[ids >= 0].sort().values, torch.arange(len(items)))


@pytest.mark.parametrize("shared", [False, True])
def test_draws_have_the_frequencies_that_log_q_says(sampler, query, shared):
    generator = torch.Generator().manual_seed(1)
    count = 200_000
    queries = query if shared else query[:1]
    ids, log_q = sampler.sample(queries, count, shared=shared, generator=generator)
    frequency = torch.bincount(ids.flatten(), minlength=sampler.num_items) / count
    said = torch.zeros(sampler.num_items).index_put((ids.flatten(),), log_q.flatten().exp())
    error = (frequency - said).abs()
    assert bool((error <= 6 * (said / count).sqrt() + 1e-12).all())


def test_drawn_probabilities_are_those_of_log_prob(sampler, query):
    ids, log_q = sampler.sample(query.view(3, 4, -1), 50)
    assert ids.shape == log_q.shape == (3, 4, 50)
    again = sampler.log_prob(query.view(3, 4, -1), ids)
    torch.testing.assert_close(log_q, again, atol=1e-5, rtol=1e-5)


def test_samples_are_close_to_the_softmax():
    torch.manual_seed(0)
    items = CATALOGUES["clusters"]()
    sampler, query = CatalogueSampler(items), torch.randn(200, 8)
    log_q = sampler.log_prob(query, everything(sampler, query)).double()
    chi_squared = (2 * softmax(sampler, items, query) - log_q).exp().sum(-1) - 1
    uniform = (2 * softmax(sampler, items, query)).exp().sum(-1) * len(items) - 1
    assert chi_squared.median() < 0.5
    assert chi_squared.median() < uniform.median() / 20


def test_the_partition_function(sampler, items, query):
    exact = (sampler.scale * query.double() @ items.double().T).logsumexp(-1)
    value, error = sampler.log_partition(query, len(sampler.ids))
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-4)
    assert not error.any()
    if len(sampler.ids) > 2 and items.abs().max() < 1e6:
        values, errors = sampler.log_partition(
            query[0].expand(4000, -1), 2, generator=torch.Generator().manual_seed(0)
        )
        ratio = (values.double() - exact[0]).exp()
        assert abs(ratio.mean() - 1) < 5 * ratio.std() / math.sqrt(4000)
        assert bool((errors > 0).any())


@pytest.mark.parametrize("k", [1, 7, None])
def test_the_best_items(sampler, items, query, k):
    k = min(k or len(items), len(items))
    values, ids = sampler.top_k(query, k)
    scores = sampler.scale * query @ items.T
    torch.testing.assert_close(values, scores.topk(k).values, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(values, scores.gather(1, ids), rtol=1e-5, atol=1e-4)
    assert all(len(row.unique()) == k for row in ids)


@pytest.mark.parametrize("change", ["none", "update_", "refresh_"])
def test_probabilities_of_the_present_items_sum_to_one(sampler, items, query, change):
    ids = torch.arange(0, len(items), 2)
    new = items.clone()
    if change != "none":
        new[ids] = torch.randn(len(ids), items.shape[1])
    if change == "update_":
        sampler.update_(ids, new[ids])
    elif change == "refresh_":
        sampler.refresh_(new)
    total = sampler.log_prob(query, everything(sampler, query)).double().exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)
    values, _ = sampler.top_k(query, 1)
    best = (sampler.scale * query @ new.T).amax(1, keepdim=True)
    torch.testing.assert_close(values, best, rtol=1e-5, atol=1e-4)


def test_seeds_repeat_and_states_load():
    items, query = torch.randn(100, 4), torch.randn(5, 4)

    def seed():
        return torch.Generator().manual_seed(3)

    sampler = CatalogueSampler(items, generator=seed())
    other = CatalogueSampler(torch.randn(100, 4), generator=seed())
    other.load_state_dict(sampler.state_dict())
    for x, y in zip(
        sampler.sample(query, 9, generator=seed()),
        other.sample(query, 9, generator=seed()),
        strict=True,
    ):
        assert torch.equal(x, y)


REFUSED = {
    "mix": lambda: CatalogueSampler(torch.randn(4, 2), mix=0.0),
    "num_blocks must be a power of two": lambda: CatalogueSampler(torch.randn(4, 2), num_blocks=3),
    "at most 4 items": lambda: CatalogueSampler(torch.randn(4, 2), num_blocks=8),
    r"items must have the shape \(n, d\)": lambda: CatalogueSampler(torch.randn(4)),
    r"items must have the shape \(n, d\), got \(0": lambda: CatalogueSampler(torch.randn(0, 2)),
    r"items holds NaN or infinity in row \[2\]": lambda: CatalogueSampler(
        torch.tensor([[1.0], [2.0], [math.nan]])
    ),
    "query holds NaN": lambda: made().sample(torch.full((1, 2), math.inf), 3),
    r"query must have the shape \(..., 2\)": lambda: made().sample(torch.randn(1, 3), 3),
    "num_samples must be 1": lambda: made().sample(torch.randn(1, 2), 0),
    "num_samples must be 2": lambda: made().log_partition(torch.randn(1, 2), 1),
    "k must lie between 1 and 9": lambda: made().top_k(torch.randn(1, 2), 10),
    "ids must lie between 0 and 8": lambda: made().log_prob(torch.randn(1, 2), torch.tensor([[9]])),
    "ids must be integers": lambda: made().log_prob(torch.randn(1, 2), torch.tensor([[0.5]])),
    "ids must name each item at most once": lambda: made().update_(
        torch.tensor([1, 1]), torch.randn(2, 2)
    ),
    r"items must have the shape \(1, 2\)": lambda: made().update_(
        torch.tensor([1]), torch.randn(2, 2)
    ),
    "target must lie between 0 and 8, got 9": lambda: loss(target=torch.tensor([9])),
    "target must have the shape": lambda: loss(target=torch.tensor([[1]])),
    "refresh_": lambda: loss(items=torch.randn(8, 2)),
    "reduction must be": lambda: loss(reduction="median"),
}


def made():
    return CatalogueSampler(torch.randn(9, 2))


def loss(items=None, target=None, **options):
    items = torch.randn(9, 2) if items is None else items
    target = torch.tensor([1]) if target is None else target
    return sampled_softmax_loss(torch.randn(1, 2), items, target, made(), 3, **options)


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()
