"""The front of error against time, and which of it is taken."""

import itertools

import pytest

from performers.planning.selection import choose, pareto_front

from .heads import setting

FAST, BALANCED, ACCURATE = setting(0.8, 1e-3), setting(0.2, 4e-3), setting(0.1, 30e-3)
FRONT = [FAST, BALANCED, ACCURATE]


@pytest.mark.parametrize("order", list(itertools.permutations(range(5)))[::17])
def test_the_front(order):
    everything = [*FRONT, setting(0.8, 2e-3), setting(0.3, 4e-3)]
    assert pareto_front([everything[i] for i in order]) == FRONT


def test_equal_settings_come_once():
    assert pareto_front([FAST, setting(0.8, 1e-3)]) == [FAST]


@pytest.mark.parametrize(
    ("error", "seconds", "expected", "met"),
    [
        (None, None, BALANCED, True),
        (0.8, None, FAST, True),
        (0.3, None, BALANCED, True),
        (0.15, None, ACCURATE, True),
        (0.05, None, ACCURATE, False),
        (None, 1.0, ACCURATE, True),
        (None, 5e-3, BALANCED, True),
        (None, 0.5e-3, FAST, False),
        (0.3, 5e-3, BALANCED, True),
        (0.15, 5e-3, BALANCED, False),
        (0.9, 0.5e-3, FAST, False),
    ],
)
def test_targets(error, seconds, expected, met):
    choice = choose(FRONT, error, seconds)
    assert choice.setting == expected
    assert choice.met is met
    assert ("NOTHING" in choice.reason) is not met


def test_the_knee_ends_where_more_time_buys_less_than_more_features_would():
    """Four times the time for half the error is what features alone give at best."""
    base = setting(0.4, 1e-3)
    assert choose([base, setting(0.21, 4e-3)], None, None).setting == base
    better = setting(0.19, 4e-3)
    assert choose([base, better], None, None).setting == better
