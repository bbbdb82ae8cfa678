import math

import pytest
import torch

from performers.catalogue import CatalogueSampler, sampled_softmax_loss
from performers.catalogue.loss import losses_of_draws


def setting(seed=0):
    torch.manual_seed(seed)
    centres = torch.randn(12, 6)
    items = centres.repeat_interleave(20, 0) + 0.3 * torch.randn(240, 6)
    query = torch.randn(5, 6)
    return items.requires_grad_(), query.requires_grad_(), torch.randint(240, (5,))


def full(query, items, target, scale):
    return torch.nn.functional.cross_entropy(scale * query @ items.T, target)


@pytest.mark.parametrize("shared", [False, True])
def test_loss_and_gradient_are_those_of_the_full_softmax(shared):
    """In expectation, to four standard errors; the bias of 4,000 draws is below them."""
    items, query, target = setting()
    # The sampler holds older items than those that are scored.
    sampler = CatalogueSampler(items.detach() + 0.1 * torch.randn(240, 6), scale=0.8)
    exact = full(query, items, target, 0.8)
    exact_gradients = torch.autograd.grad(exact, (query, items))
    generator = torch.Generator().manual_seed(0)
    losses, gradients = [], []
    for _ in range(40):
        loss = sampled_softmax_loss(
            query, items, target, sampler, 4000, shared=shared, generator=generator
        )
        losses.append(loss.detach())
        gradients.append(
            torch.cat([x.flatten() for x in torch.autograd.grad(loss, (query, items))])
        )
    check(torch.stack(losses), exact.detach(), 4)
    wanted = torch.cat([x.flatten() for x in exact_gradients])
    found = torch.stack(gradients)
    # Four standard errors for all together: one of 1,470 numbers may pass them by chance.
    check(found, wanted, 5)
    check(found @ wanted, wanted @ wanted, 4)


def check(samples, wanted, errors):
    standard_error = samples.std(0) / math.sqrt(len(samples))
    assert bool(((samples.mean(0) - wanted).abs() <= errors * standard_error + 1e-5).all())


@pytest.mark.parametrize("count", [20, 2000], ids=["all products", "drawn rows"])
def test_losses_of_draws_are_those_of_the_formula(count):
    torch.manual_seed(0)
    items, query = torch.randn(count, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    target, ids, log_q = torch.arange(5), torch.randint(10, (5, 8)), -torch.rand(5, 8)
    losses = losses_of_draws(query, items, target, ids, log_q, 0.7)
    wanted = []
    for x, t, drawn, log in zip(query, target, ids, log_q, strict=True):
        right = (0.7 * x @ items[t]).exp()
        others = (0.7 * items[drawn] @ x - log).exp() / 8
        wanted.append((right + others[drawn != t].sum()).log() - right.log())
    torch.testing.assert_close(losses, torch.stack(wanted))
    for found, expected in zip(
        torch.autograd.grad(losses.sum(), (query, items)),
        torch.autograd.grad(torch.stack(wanted).sum(), (query, items)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_one_item_has_no_loss():
    items = torch.randn(1, 3, requires_grad=True)
    loss = sampled_softmax_loss(
        torch.randn(4, 3), items, torch.zeros(4, dtype=torch.int64), CatalogueSampler(items), 5
    )
    loss.backward()
    assert loss.item() == 0
    assert not items.grad.any()


def test_reductions_and_shapes():
    items, query, target = setting()
    sampler = CatalogueSampler(items)

    def loss(reduction):
        generator = torch.Generator().manual_seed(1)
        return sampled_softmax_loss(
            query.view(1, 5, 6),
            items,
            target.view(1, 5),
            sampler,
            10,
            reduction=reduction,
            generator=generator,
        )

    assert loss("none").shape == (1, 5)
    torch.testing.assert_close(loss("none").sum(), loss("sum"))
    torch.testing.assert_close(loss("none").mean(), loss("mean"))


def test_half_precision():
    items, query, target = (x.detach() for x in setting())
    sampler = CatalogueSampler(items.bfloat16())
    loss = sampled_softmax_loss(query.bfloat16(), items.bfloat16(), target, sampler, 4000)
    assert abs(float(loss) - float(full(query, items, target, 1.0))) < 0.1
