"""Sorting, convex hulls and tours: inputs, right answers, and scores of answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

EXACT_TOUR = 12
"""Most points of a tour that is found exactly."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Task:
    """A problem over points.

    Attributes:
        input_size: Numbers of a point.
        ends: Whether an answer has fewer steps than there are points.
        answer: Order of the points ``(B, N, input_size)``: int64 ``(B, T)``, the end ``N``, -100
            after it.
        score: Share of right answers, and a measure of how good wrong ones are, of ``points``,
            the model's answer and the right one.
    """

    input_size: int
    ends: bool
    answer: Callable[[Tensor], Tensor]
    score: Callable[[Tensor, Tensor, Tensor], tuple[float, float]]


def sort(points: Tensor) -> Tensor:
    """Points from small to large."""
    return points[..., 0].argsort(dim=1)


def score_sort(points: Tensor, answer: Tensor, right: Tensor) -> tuple[float, float]:
    """Share of sequences in order, and of steps that are right."""
    same = answer == right
    return same.all(1).float().mean().item(), same.float().mean().item()


def hull(points: Tensor) -> Tensor:
    """Convex hulls counterclockwise from the leftmost point, then the end."""
    rows = [[*convex_hull(row), len(row)] for row in points.tolist()]
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-100)


def convex_hull(points: list[Point]) -> list[int]:
    """Corners of the convex hull counterclockwise from the leftmost (Andrew's monotone chain)."""
    order = sorted(range(len(points)), key=points.__getitem__)

    def chain(numbers: list[int]) -> list[int]:
        kept: list[int] = []
        for number in numbers:
            while len(kept) > 1 and _turn(*(points[i] for i in (*kept[-2:], number))) <= 0:
                kept.pop()
            kept.append(number)
        return kept[:-1]

    return chain(order) + chain(order[::-1]) if len(order) > 1 else order


def _turn(a: Point, b: Point, c: Point) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def score_hull(points: Tensor, answer: Tensor, right: Tensor) -> tuple[float, float]:
    """Share of hulls that are right, and the area of the answer's hull over the right one."""
    exact, share = 0, 0.0
    for row, found, wanted in zip(points.tolist(), answer.tolist(), right.tolist(), strict=True):
        corners, truth = ([i for i in order if 0 <= i < len(row)] for order in (found, wanted))
        exact += corners == truth
        chosen = [row[number] for number in corners]
        share += _area([chosen[i] for i in convex_hull(chosen)]) / _area([row[i] for i in truth])
    return exact / len(points), share / len(points)


def _area(polygon: list[Point]) -> float:
    sides = zip(polygon, polygon[1:] + polygon[:1], strict=True)
    return 0.5 * sum(a[0] * b[1] - a[1] * b[0] for a, b in sides)


def tour(points: Tensor) -> Tensor:
    """Short tours from point 0: the shortest up to 12 points, 2-opt above.

    Of the two directions the one whose second point has the smaller number.
    """
    order = shortest_tours(points) if points.shape[1] <= EXACT_TOUR else two_opt(points)
    turned = torch.cat((order[:, :1], order[:, 1:].flip(1)), dim=1)
    return torch.where(order[:, 1:2] <= order[:, -1:], order, turned)


def shortest_tours(points: Tensor) -> Tensor:
    """Shortest tours from point 0 by dynamic programming over subsets (Held and Karp)."""
    batch, count = points.shape[:2]
    distance = torch.cdist(points, points)
    if count == 1:
        return torch.zeros(batch, 1, dtype=torch.int64)
    others = count - 1
    # best[:, s, j]: shortest way from 0 through all of the subset s that ends in its j.
    best = distance.new_full((batch, 1 << others, others), torch.inf)
    before = torch.zeros(batch, 1 << others, others, dtype=torch.int64)
    for last in range(others):
        best[:, 1 << last, last] = distance[:, 0, last + 1]
    for subset in range(1, 1 << others):
        for last in range(others):
            rest = subset & ~(1 << last)
            if rest != subset and rest:
                length = best[:, rest] + distance[:, 1:, last + 1]
                best[:, subset, last], before[:, subset, last] = length.min(dim=1)
    left = torch.full((batch,), (1 << others) - 1)
    rows = torch.arange(batch)
    order = [(best[rows, left] + distance[:, 1:, 0]).argmin(1)]
    for _ in range(others - 1):
        end = order[-1]
        order.append(before[rows, left, end])
        left = left & ~(1 << end)
    return torch.cat((torch.zeros(batch, 1).long(), 1 + torch.stack(order[::-1], dim=1)), dim=1)


def two_opt(points: Tensor) -> Tensor:
    """Tours from point 0: nearest neighbours, then 2-opt until no exchange is shorter."""
    tours = []
    for distance in torch.cdist(points, points).tolist():
        count = len(distance)
        order, free = [0], set(range(1, count))
        while free:
            order.append(min(free, key=distance[order[-1]].__getitem__))
            free.remove(order[-1])
        improved = True
        while improved:
            improved = False
            for i, j in itertools.combinations(range(1, count), 2):
                a, b, c, d = order[i - 1], order[i], order[j], order[(j + 1) % count]
                if distance[a][c] + distance[b][d] < distance[a][b] + distance[c][d] - 1e-9:
                    order[i : j + 1] = order[i : j + 1][::-1]
                    improved = True
        tours.append(order)
    return torch.tensor(tours)


def score_tour(points: Tensor, answer: Tensor, right: Tensor) -> tuple[float, float]:
    """Share of tours no longer than the reference, and the mean of their length over its length."""
    ratio = tour_length(points, answer) / tour_length(points, right)
    return (ratio < 1 + 1e-5).float().mean().item(), ratio.mean().item()


def tour_length(points: Tensor, order: Tensor) -> Tensor:
    """Lengths of closed tours, shape (B,)."""
    places = points.gather(1, order.unsqueeze(-1).expand(-1, -1, points.shape[-1]))
    return (places - places.roll(-1, 1)).norm(dim=-1).sum(1)


TASKS = {
    "sorting": Task(1, False, sort, score_sort),
    "hull": Task(2, True, hull, score_hull),
    "tour": Task(2, False, tour, score_tour),
}


def draw(task: Task, batch: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Uniform points in the unit cube and their answer."""
    points = torch.rand(batch, count, task.input_size, generator=generator)
    return points, task.answer(points)
