"""Right answers of the pointing tasks, by enumeration."""

import itertools

import pytest
import torch

from studies.pointer.tasks import (
    TASKS,
    convex_hull,
    draw,
    shortest_tours,
    tour,
    tour_length,
    two_opt,
)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("count", [3, 7])
def test_right_answers_have_full_scores(name, count):
    task = TASKS[name]
    points, answer = draw(task, 5, count, torch.Generator().manual_seed(0))
    right, measure = task.score(points, answer, answer)
    assert right == 1
    assert measure == pytest.approx(1)


def test_hulls_leave_no_point_outside():
    points = torch.rand(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    corners = points[convex_hull(points.tolist())]
    side = corners.roll(-1, 0) - corners
    offset = points[:, None] - corners
    assert bool((side[:, 0] * offset[..., 1] - side[:, 1] * offset[..., 0] >= -1e-12).all())
    assert corners[:, 0].argmin() == 0


def test_points_on_a_side_are_no_corners():
    square = [(0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)]
    assert convex_hull(square) == [0, 2, 3, 4]


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_tours_are_the_shortest(count):
    points = torch.rand(4, count, 2, generator=torch.Generator().manual_seed(1))
    orders = torch.tensor([(0, *rest) for rest in itertools.permutations(range(1, count))])
    every = torch.stack([tour_length(points, order.expand(4, -1)) for order in orders])
    torch.testing.assert_close(tour_length(points, shortest_tours(points)), every.amin(0))


def test_two_opt_is_a_tour_and_not_much_longer():
    points = torch.rand(4, 10, 2, generator=torch.Generator().manual_seed(1))
    order = two_opt(points)
    assert torch.equal(order.sort(1).values, torch.arange(10).expand(4, -1))
    shortest = tour_length(points, shortest_tours(points))
    assert bool((tour_length(points, order) < 1.2 * shortest).all())


@pytest.mark.parametrize("count", [8, 14])
def test_tours_have_one_direction(count):
    order = tour(torch.rand(3, count, 2, generator=torch.Generator().manual_seed(2)))
    assert not order[:, 0].any()
    assert bool((order[:, 1] < order[:, -1]).all())
